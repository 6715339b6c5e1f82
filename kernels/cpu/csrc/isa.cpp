#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>

namespace neo {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::kScalar;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (const Isa isa : kAll) {
    if (has(isa)) {
      found.push_back(isa);
    }
  }
  return found;
}

Isa chosen_isa() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("NEO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return available.back();
  }
  std::string names;
  for (const Isa isa : available) {
    if (isa_name(isa) == std::string(wanted)) {
      return isa;
    }
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("NEO_CPU_ISA is '" + std::string(wanted) + "'; this machine can run " + names);
}

StripKernel strip_kernel(Isa isa, DType kv, DType activation) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Bf16) {
    if (const StripKernel kernel = avx512bf16_strip(kv, activation); kernel.attend != nullptr) {
      return kernel;
    }
  }
  if (isa >= Isa::kAvx512) {
    return avx512_strip(kv, activation);
  }
  if (isa >= Isa::kAvx2) {
    return avx2_strip(kv, activation);
  }
#endif
  (void)isa;
  return scalar_strip(kv, activation);
}

}  // namespace neo
