// The fused head's work on a tile of logits between two matrix products: softmax statistics in the forward pass, the
// in-place gradient in the backward pass.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace fastalign {

// Logits (rows, cols) contiguous, float or double (C below); column c is token first + c of the vocabulary.
struct HeadTile {
  void* data;
  DType dtype;
  int64_t rows, cols;
  const int64_t* labels;  // (rows,), within the whole vocabulary
  int64_t first;
  Transform transform;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // stats C (7, stats_stride): max, sum, label logit, then (only with `all`) weighted, squares, total, max before the
  // label, as SoftmaxStats; before the first tile both maxima must be -inf and the rest 0. bias C (cols,) or null is
  // added to the tile. With rescale C (rows,), the tile becomes exp(z - max) dz/dx / slope, and rescale is the factor
  // for the sums of earlier tiles.
  void head_forward(const HeadTile& tile, const void* bias, void* stats, int64_t stats_stride, bool all, void* rescale,
                    int threads);
  // tile := d(loss)/d(logits) before the bias. logits: with their bias; null: they are in the tile, without it.
  // rows C (5, rows_stride): gradient of log p, gradient of the entropy, max, sum, entropy. Entries with p < filter
  // become 0, and kept (threads, cols), initially all false, becomes true where a slice of rows has a nonzero entry;
  // with filter 0, kept is not read.
  void head_backward(const HeadTile& tile, const void* logits, const void* bias, const void* rows, int64_t rows_stride,
                     double filter, bool* kept, int threads);
)
