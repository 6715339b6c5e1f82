// Vector loops for AVX2 with FMA and F16C: eight floats in a register.
#include <immintrin.h>

#include "strip_fma.hpp"

namespace neo {
namespace {

struct Vec256 {
  static constexpr int32_t kLanes = 8;
  static constexpr int32_t kTiles = 1;  // with 4 heads: 8 accumulators of the 16 registers
  static constexpr int32_t kColumns = 1;
  __m256 x;

  static Vec256 all(float value) { return {_mm256_set1_ps(value)}; }
  static Vec256 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  void store(float* to) const { _mm256_storeu_ps(to, x); }
  float first() const { return _mm256_cvtss_f32(x); }
  float largest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  template <DType kv>
  struct Wide;
};

inline Vec256 operator+(Vec256 a, Vec256 b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec256 operator-(Vec256 a, Vec256 b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec256 operator*(Vec256 a, Vec256 b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec256 operator/(Vec256 a, Vec256 b) { return {_mm256_div_ps(a.x, b.x)}; }
inline Vec256 fma(Vec256 a, Vec256 b, Vec256 c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec256 max(Vec256 a, Vec256 b) { return {_mm256_max_ps(a.x, b.x)}; }
inline bool any_greater(Vec256 a, Vec256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ)) != 0; }
inline Vec256 where_less(Vec256 a, Vec256 b, Vec256 yes, Vec256 no) {
  return {_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ))};
}

// As in vec_avx512.hpp; the exponent is added to the bits, which leaves NaN alone since its conversion shifts out.
inline Vec256 exp(Vec256 v) {
  const __m256 floor = _mm256_set1_ps(-87.0F);
  const __m256 keep = _mm256_cmp_ps(v.x, floor, _CMP_NLT_UQ);
  const __m256 x = _mm256_min_ps(_mm256_set1_ps(88.0F), _mm256_max_ps(floor, v.x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504F)), 8);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375F), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4F), r);
  __m256 y = _mm256_set1_ps(1.9875691500e-4F);
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.3981999507e-3F));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(8.3334519073e-3F));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(4.1665795894e-2F));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.6666665459e-1F));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(5.0000001201e-1F));
  y = _mm256_fmadd_ps(y, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0F)));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
  return {_mm256_and_ps(scaled, keep)};
}

template <>
struct Vec256::Wide<DType::kFloat32> {
  static constexpr int32_t kPacked = 1, kBytes = 4;
  template <int32_t j>
  static Vec256 get(const std::byte* row, int32_t n) {
    return load(reinterpret_cast<const float*>(row) + n);
  }
};

template <>
struct Vec256::Wide<DType::kFloat16> {
  static constexpr int32_t kPacked = 1, kBytes = 2;
  template <int32_t j>
  static Vec256 get(const std::byte* row, int32_t n) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + n * 2)))};
  }
};

template <>
struct Vec256::Wide<DType::kBFloat16> {
  static constexpr int32_t kPacked = 2, kBytes = 2;
  template <int32_t j>
  static Vec256 get(const std::byte* row, int32_t n) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + n * 4));
    return {_mm256_castsi256_ps(j == 0 ? _mm256_slli_epi32(x, 16)
                                       : _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
  }
};

template <>
struct Vec256::Wide<DType::kInt8> {
  static constexpr int32_t kPacked = 4, kBytes = 1;
  template <int32_t j>
  static Vec256 get(const std::byte* row, int32_t n) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + n * 4));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(j == 3 ? x : _mm256_slli_epi32(x, 24 - 8 * j), 24))};
  }
};

}  // namespace

StripKernel avx2_strip(DType kv, DType) { return fma_strip<Vec256>(kv); }

}  // namespace neo
