// What the fused head does to a tile of logits between two matrix products: statistics of the softmax going
// forward, the gradient in place going back.
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
  // label, as SoftmaxStats; the first tile finds -inf in both maxima and 0 in the rest. bias C (cols,) or null is
  // added to the tile. With rescale C (rows,), the tile becomes exp(z - max) dz/dx / slope, and rescale tells what
  // the sums of earlier tiles are to be multiplied by.
  void head_forward(const HeadTile& tile, const void* bias, void* stats, int64_t stats_stride, bool all, void* rescale,
                    int threads);
  // tile := d(loss)/d(logits) before the bias. logits: where they are, with their bias; null: in the tile, without it.
  // rows C (5, rows_stride): gradient of log p, gradient of the entropy, max, sum, entropy. Entries with p < filter
  // become 0, and kept (threads, cols), all false before, is set true where a slice of rows holds one that is not 0;
  // kept is not read with filter 0.
  void head_backward(const HeadTile& tile, const void* logits, const void* bias, const void* rows, int64_t rows_stride,
                     double filter, bool* kept, int threads);
)
