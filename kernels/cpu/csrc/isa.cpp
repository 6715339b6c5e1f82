#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace neo {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx, Isa::kNeon};

#if defined(__x86_64__)
// Tiles need the kernel's leave, which it gives to a process and all of its threads (Linux 5.16, x86/xstate.rst).
bool has_tiles() {
#ifdef NEO_EMULATE_AMX
  return true;
#else
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool dots = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return dots;
    case Isa::kAmx:
      return dots && has_tiles();
    case Isa::kNeon:
      return false;
  }
  return false;
#elif defined(__aarch64__)
  return isa == Isa::kScalar || isa == Isa::kNeon;  // every 64-bit Arm CPU that runs Linux has it
#else
  return isa == Isa::kScalar;
#endif
}

// A tile takes as long for one head as for sixteen, dot products grow with heads. Sapphire Rapids, 14 threads,
// docs/perf-log.md.
[[maybe_unused]] bool tiles_win(DType kv, int32_t group) { return group >= (kv == DType::kInt8 ? 8 : 4); }

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
    case Isa::kAmx:
      return "amx";
    case Isa::kNeon:
      return "neon";
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

IsaChoice chosen_isa() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("NEO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return {available.back(), false};
  }
  std::string names;
  for (const Isa isa : available) {
    if (isa_name(isa) == std::string(wanted)) {
      return {isa, true};
    }
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("NEO_CPU_ISA is '" + std::string(wanted) + "'; this machine can run " + names);
}

Loop best_loop(IsaChoice choice, DType kv, DType activation, int32_t group) {
#if defined(__x86_64__)
  if (choice.isa >= Isa::kAmx && (choice.forced || tiles_win(kv, group))) {
    if (const StripKernel kernel = amx_strip(kv, activation); kernel.attend != nullptr) {
      return {kernel, Isa::kAmx};
    }
  }
  if (choice.isa >= Isa::kAvx512Bf16) {
    if (const StripKernel kernel = avx512bf16_strip(kv, activation); kernel.attend != nullptr) {
      return {kernel, Isa::kAvx512Bf16};
    }
  }
  if (choice.isa >= Isa::kAvx512) {
    return {avx512_strip(kv, activation), Isa::kAvx512};
  }
  if (choice.isa >= Isa::kAvx2) {
    return {avx2_strip(kv, activation), Isa::kAvx2};
  }
#elif defined(__aarch64__)
  if (choice.isa == Isa::kNeon) {
    return {neon_strip(kv, activation), Isa::kNeon};
  }
#endif
  (void)choice;
  (void)group;
  return {scalar_strip(kv, activation), Isa::kScalar};
}

}  // namespace neo
