#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastalign {

bool isa_available(Isa isa) {
  if (isa == Isa::baseline) return true;
#if FASTALIGN_X86
  __builtin_cpu_init();  // also checks that the operating system saves the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

static Isa choose_isa() {
  const char* requested = std::getenv("FASTALIGN_ISA");
  if (requested != nullptr && *requested != '\0') {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(requested) != isa_name(isa)) continue;
      if (isa_available(isa)) return isa;
      throw std::runtime_error(std::string("FASTALIGN_ISA names ") + requested + ", which this processor does not have");
    }
    throw std::runtime_error(std::string("FASTALIGN_ISA must be baseline, avx2 or avx512, got ") + requested);
  }
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::baseline;
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fastalign
