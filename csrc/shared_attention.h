// Attention of one new token of each row over a prompt that many rows share, and over the row's own tokens.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace fastalign {

struct SharedPrompt {
  const void* keys;    // (kv, d, length): transposed
  const void* values;  // (kv, length, dv)
  int64_t length;
  int64_t first, count;  // which of SharedAttention::order are its rows
};

// Everything of one dtype; n rows in flight, their heads in kv groups of `group` queries.
struct SharedAttention {
  void* out;               // (n, kv * group, dv)
  void *keys, *values;     // (places, kv, room, d) and dv: the rows' own; the new token comes at lengths[row]
  Rows query, key, value;  // n * kv * group rows of d, n * kv of d and of dv: of the new token
  const SharedPrompt* prompts;
  int64_t prompt_count;
  const int64_t* order;    // (n,): the rows, prompt by prompt
  const int64_t* lengths;  // (n,): own tokens before the new one
  int64_t kv, group, room, d, dv;
  int64_t window;          // a token sees so many, itself included; 0: all
  float scaling, softcap;  // softcap * tanh(score / softcap); 0: none
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  void shared_attention(const SharedAttention& in, int threads);
)
