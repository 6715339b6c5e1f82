// Which instruction sets this build and this machine have, and the vector loop to use.
#pragma once

#include <string>
#include <vector>

#include "strip.hpp"

namespace neo {

enum class Isa : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);

// What this machine can run, worst first; "scalar" always.
std::vector<Isa> available_isas();

// The best one but kAmx, or what NEO_CPU_ISA names when this is called. Throws std::invalid_argument if the machine
// lacks that.
Isa chosen_isa();

// The best loop for these types that needs no more than `isa`.
StripKernel strip_kernel(Isa isa, DType kv, DType activation);

}  // namespace neo
