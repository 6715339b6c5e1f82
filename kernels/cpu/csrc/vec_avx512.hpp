// Sixteen floats in a register, AVX-512. Internal to each translation unit that includes it.
#pragma once

#include <immintrin.h>

#include "strip.hpp"

namespace neo {
namespace {

struct Vec512 {
  static constexpr int32_t kLanes = 16;
  static constexpr int32_t kTiles = 4;    // with 4 heads: 16 accumulators of the 32 registers
  static constexpr int32_t kColumns = 4;  // likewise
  __m512 x;

  static Vec512 all(float value) { return {_mm512_set1_ps(value)}; }
  static Vec512 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  void store(float* to) const { _mm512_storeu_ps(to, x); }
  float first() const { return _mm512_cvtss_f32(x); }
  float largest() const { return _mm512_reduce_max_ps(x); }

  template <DType kv>
  struct Wide;
};

inline Vec512 operator+(Vec512 a, Vec512 b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec512 operator-(Vec512 a, Vec512 b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec512 operator*(Vec512 a, Vec512 b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec512 operator/(Vec512 a, Vec512 b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec512 fma(Vec512 a, Vec512 b, Vec512 c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec512 max(Vec512 a, Vec512 b) { return {_mm512_max_ps(a.x, b.x)}; }
inline bool any_greater(Vec512 a, Vec512 b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ) != 0; }
inline Vec512 where_less(Vec512 a, Vec512 b, Vec512 yes, Vec512 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ), no.x, yes.x)};
}

// 2^x = 2^floor(x) * 2^r, r in [0, 1) by a polynomial fitted for the least relative error (8e-8, in fp32 2e-7). Half
// the instructions of Cephes' expf. 0 below -87; NaN stays NaN.
inline Vec512 exp(Vec512 v) {
  const __m512 x = _mm512_mul_ps(v.x, _mm512_set1_ps(1.44269504F));
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0F), _CMP_NLT_UQ);
  const __m512 r = _mm512_reduce_ps(x, 9);  // x - floor(x)
  __m512 y = _mm512_set1_ps(1.867130496e-3F);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.017029415e-3F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.579991376e-2F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.401644500e-1F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.931513118e-1F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0F));
  return {_mm512_maskz_scalef_ps(keep, y, x)};
}

template <>
struct Vec512::Wide<DType::kFloat32> {
  static constexpr int32_t kPacked = 1, kBytes = 4;
  template <int32_t j>
  static Vec512 get(const std::byte* row, int32_t) {
    return {_mm512_loadu_ps(row)};
  }
};

template <>
struct Vec512::Wide<DType::kFloat16> {
  static constexpr int32_t kPacked = 1, kBytes = 2;
  template <int32_t j>
  static Vec512 get(const std::byte* row, int32_t) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)))};
  }
};

template <>
struct Vec512::Wide<DType::kBFloat16> {
  static constexpr int32_t kPacked = 2, kBytes = 2;
  template <int32_t j>
  static Vec512 get(const std::byte* row, int32_t) {
    const __m512i x = _mm512_loadu_si512(row);
    return {_mm512_castsi512_ps(j == 0 ? _mm512_slli_epi32(x, 16)
                                       : _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
  }
};

template <>
struct Vec512::Wide<DType::kInt8> {
  static constexpr int32_t kPacked = 4, kBytes = 1;
  template <int32_t j>
  static Vec512 get(const std::byte* row, int32_t) {
    const __m512i x = _mm512_loadu_si512(row);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(j == 3 ? x : _mm512_slli_epi32(x, 24 - 8 * j), 24))};
  }
};

}  // namespace
}  // namespace neo
