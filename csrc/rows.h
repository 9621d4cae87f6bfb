// Rows of logits: a strided view of (rows, vocab) in any storage type, and the transform every op applies first.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastalign {

// Row r = o * inner + i starts at data + o * outer_stride + i * inner_stride (in elements); a row is contiguous.
// Two strides, because logits[:, :-1] of a (batch, time, vocab) tensor cannot be walked with one.
struct Rows {
  const void* data;
  DType dtype;
  int64_t count, inner, outer_stride, inner_stride, vocab;

  template <typename S> const S* row(int64_t r) const {
    return static_cast<const S*>(data) + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

// z = softcap * tanh(s x / softcap) / temperature with s = logit_scale; softcap 0 means none.
struct Transform {
  double temperature = 1.0;
  double softcap = 0.0;
  double logit_scale = 1.0;
};

}  // namespace fastalign
