// The work between a decoder layer's matrix products: norm, gate and rotation, one pass each. What is not given as Rows is contiguous. The
// backward passes are for float32; the others take float32, bfloat16 and float16, and compute in float32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

FASTALIGN_DECLARE(
  // y = (offset + weight) x rstd with rstd = 1 / sqrt(mean(x^2) + eps) of each row; x, y (rows, width), rstd (rows,).
  void rms_norm(void* y, float* rstd, const void* x, const void* weight, DType dtype, int64_t rows, int64_t width, float eps,
                float offset, int threads);
  // dx (rows, width), and dweight (threads, width) unless null: each thread's part of the sum over rows.
  void rms_norm_backward(float* dx, float* dweight, const float* dy, const float* x, const float* rstd,
                         const float* weight, int64_t rows, int64_t width, float offset, int threads);

  // out = silu(gate) up; out contiguous, all three of the same rows
  void silu_gate(void* out, const Rows& gate, const Rows& up, int threads);
  // From dout: dgate and dup. dout is overwritten with out, which the following product needs again.
  void silu_gate_backward(float* dgate, float* dup, float* dout, const float* gate, const float* up, int64_t n,
                          int threads);

  // Rotates the halves of each head: out (tokens, heads, d) from x, tokens * heads rows of d; cos and sin (tokens, d).
  // inverse: the transposed map, i.e. the backward pass.
  void rotate(void* out, const Rows& x, const void* cosine, const void* sine, int64_t tokens, int64_t heads, bool inverse,
              int threads);
)
