// Which instruction sets this build and this machine have, and the vector loop to use.
#pragma once

#include <string>
#include <vector>

#include "strip.hpp"

namespace neo {

enum class Isa : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

const char* isa_name(Isa isa);

// What this machine can run, worst first; "scalar" always.
std::vector<Isa> available_isas();

struct IsaChoice {
  Isa isa;
  bool forced;  // for everything, and not only where it is fastest
};

// The best one, or what NEO_CPU_ISA names when this is called. Throws std::invalid_argument if the machine lacks that.
IsaChoice chosen_isa();

struct Loop {
  StripKernel kernel;
  Isa isa;  // what it needs
};

// The best loop for these types and this many query heads a KV head that needs no more than what was chosen.
Loop best_loop(IsaChoice choice, DType kv, DType activation, int32_t group);

}  // namespace neo
