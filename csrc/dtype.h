// The storage types of tensors, and a switch from a run-time dtype to a template argument.
#pragma once

#include <cstdint>

namespace fastalign {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

enum class DType { float32, float64, bfloat16, float16 };

}  // namespace fastalign

// FASTALIGN_SWITCH(dtype, S, body) runs body with S bound to the storage type.
#define FASTALIGN_SWITCH(dtype, S, ...)                                                     \
  switch (dtype) {                                                                          \
    case ::fastalign::DType::float32: { using S = float; __VA_ARGS__; } break;              \
    case ::fastalign::DType::float64: { using S = double; __VA_ARGS__; } break;             \
    case ::fastalign::DType::bfloat16: { using S = ::fastalign::bfloat16; __VA_ARGS__; } break; \
    case ::fastalign::DType::float16: { using S = ::fastalign::float16; __VA_ARGS__; } break; \
  }
// The same for the types whose sums are float32; others do nothing, and the bindings refuse them.
#define FASTALIGN_SWITCH_FLOAT(dtype, S, ...)                                               \
  switch (dtype) {                                                                          \
    case ::fastalign::DType::float32: { using S = float; __VA_ARGS__; } break;              \
    case ::fastalign::DType::bfloat16: { using S = ::fastalign::bfloat16; __VA_ARGS__; } break; \
    case ::fastalign::DType::float16: { using S = ::fastalign::float16; __VA_ARGS__; } break; \
    case ::fastalign::DType::float64: break;                                                \
  }
