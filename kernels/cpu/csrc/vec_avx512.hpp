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

// Cephes' expf: 2 ulp. 0 below -87; NaN stays NaN (max returns its second operand then).
inline Vec512 exp(Vec512 v) {
  const __m512 floor = _mm512_set1_ps(-87.0F);
  const __mmask16 keep = _mm512_cmp_ps_mask(v.x, floor, _CMP_NLT_UQ);
  const __m512 x = _mm512_min_ps(_mm512_set1_ps(88.0F), _mm512_max_ps(floor, v.x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375F), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4F), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4F);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1F));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1F));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0F)));
  return {_mm512_maskz_scalef_ps(keep, y, n)};
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
