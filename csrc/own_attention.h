// Attention of one new token over the shared prompt and over the candidate's own tokens.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastalign {

// All float32 and contiguous. `rows` are the cache slots of the n rows of one prompt.
struct OwnAttention {
  float *keys, *values;         // (places, kv, room, d) and dv: the candidates' own; the new token comes at lengths[place]
  const float *query;           // (places, kv * group, d)
  const float *key, *value;     // (places, kv, d) and dv, of the new token
  const float *prompt_sum;      // (kv, n * group, dv): sum over the prompt of exp(score - max) value
  const float *prompt_max, *prompt_mass;  // (kv, n * group)
  const int64_t *rows, *lengths;          // (n,), (places,)
  int64_t n, kv, group, room, d, dv;  // the width of values may differ from that of keys
  float scaling;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // In place over (rows, length): exp(scaling x - max); max and the sum of these, (rows,). Row r begins at r * length.
  void exp_rows(float* scores, float* max, float* mass, int64_t rows, int64_t length, float scaling, int threads);

  // out (places, kv * group, dv)
  void own_attention(float* out, const OwnAttention& in, int threads);
)
