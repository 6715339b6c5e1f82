// Vector loops for AVX-512 (F, BW, DQ, VL).
#include "strip_fma.hpp"
#include "vec_avx512.hpp"

namespace neo {

StripKernel avx512_strip(DType kv, DType) { return fma_strip<Vec512>(kv); }

}  // namespace neo
