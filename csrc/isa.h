// Which instruction set the kernels run on, chosen at run time.
//
// Every op's source is compiled once per level, with FASTALIGN_LEVEL set to the level's name. Its definitions are in
// namespace fastalign::<level>, so that no inline function compiled for a newer processor can be linked into
// code for an older one. This header is the only thing those files share with the rest.
#pragma once

#if defined(__x86_64__) && !defined(FASTALIGN_ONE_LEVEL)  // one: tools/sanitize.py
#define FASTALIGN_X86 1
#else
#define FASTALIGN_X86 0
#endif

namespace fastalign {

enum class Isa { baseline, avx2, avx512 };

// The level in use: the best one that the processor supports, or the one that FASTALIGN_ISA names.
// Throws std::runtime_error if FASTALIGN_ISA names an unknown or unavailable level.
Isa active_isa();
bool isa_available(Isa isa);
const char* isa_name(Isa isa);

}  // namespace fastalign

// FASTALIGN_DECLARE(void f(int);) declares f in the namespace of each level that is built.
#if FASTALIGN_X86
#define FASTALIGN_DECLARE(...)                 \
  namespace fastalign::baseline { __VA_ARGS__ } \
  namespace fastalign::avx2 { __VA_ARGS__ }     \
  namespace fastalign::avx512 { __VA_ARGS__ }
// FASTALIGN_CALL(f, args...) calls the active level's f.
#define FASTALIGN_CALL(f, ...)                                        \
  [&] {                                                               \
    switch (::fastalign::active_isa()) {                              \
      case ::fastalign::Isa::avx512: return ::fastalign::avx512::f(__VA_ARGS__); \
      case ::fastalign::Isa::avx2: return ::fastalign::avx2::f(__VA_ARGS__);     \
      default: return ::fastalign::baseline::f(__VA_ARGS__);          \
    }                                                                 \
  }()
#else
#define FASTALIGN_DECLARE(...) namespace fastalign::baseline { __VA_ARGS__ }
#define FASTALIGN_CALL(f, ...) ::fastalign::baseline::f(__VA_ARGS__)
#endif
