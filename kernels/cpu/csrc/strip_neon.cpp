// Vector loops for 64-bit Arm (NEON): four floats in a register. Tested under emulation only, never timed.
#include <arm_neon.h>

#include "strip_fma.hpp"

namespace neo {
namespace {

struct Vec128 {
  static constexpr int32_t kLanes = 4;
  static constexpr int32_t kTiles = 1;  // with 4 heads: 16 accumulators of the 32 registers
  static constexpr int32_t kColumns = 1;
  float32x4_t x;

  static Vec128 all(float value) { return {vdupq_n_f32(value)}; }
  static Vec128 load(const float* from) { return {vld1q_f32(from)}; }
  void store(float* to) const { vst1q_f32(to, x); }
  float first() const { return vgetq_lane_f32(x, 0); }
  float largest() const { return vmaxnmvq_f32(x); }

  template <DType kv>
  struct Wide;
};

inline Vec128 operator+(Vec128 a, Vec128 b) { return {vaddq_f32(a.x, b.x)}; }
inline Vec128 operator-(Vec128 a, Vec128 b) { return {vsubq_f32(a.x, b.x)}; }
inline Vec128 operator*(Vec128 a, Vec128 b) { return {vmulq_f32(a.x, b.x)}; }
inline Vec128 operator/(Vec128 a, Vec128 b) { return {vdivq_f32(a.x, b.x)}; }
inline Vec128 fma(Vec128 a, Vec128 b, Vec128 c) { return {vfmaq_f32(c.x, a.x, b.x)}; }
inline Vec128 max(Vec128 a, Vec128 b) { return {vmaxnmq_f32(a.x, b.x)}; }
inline bool any_greater(Vec128 a, Vec128 b) { return vmaxvq_u32(vcgtq_f32(a.x, b.x)) != 0; }
inline Vec128 where_less(Vec128 a, Vec128 b, Vec128 yes, Vec128 no) {
  return {vbslq_f32(vcltq_f32(a.x, b.x), yes.x, no.x)};
}

// As in strip_avx2.cpp: Cephes' expf, the exponent added to the bits, 0 below -87. vmaxq keeps NaN.
inline Vec128 exp(Vec128 v) {
  const uint32x4_t small = vcltq_f32(v.x, vdupq_n_f32(-87.0F));
  const float32x4_t x = vminq_f32(vdupq_n_f32(88.0F), vmaxq_f32(vdupq_n_f32(-87.0F), v.x));
  const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504F)));
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375F));
  r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4F));
  float32x4_t y = vdupq_n_f32(1.9875691500e-4F);
  y = vfmaq_f32(vdupq_n_f32(1.3981999507e-3F), y, r);
  y = vfmaq_f32(vdupq_n_f32(8.3334519073e-3F), y, r);
  y = vfmaq_f32(vdupq_n_f32(4.1665795894e-2F), y, r);
  y = vfmaq_f32(vdupq_n_f32(1.6666665459e-1F), y, r);
  y = vfmaq_f32(vdupq_n_f32(5.0000001201e-1F), y, r);
  y = vfmaq_f32(vaddq_f32(r, vdupq_n_f32(1.0F)), y, vmulq_f32(r, r));
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
  const float32x4_t scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent));
  return {vbslq_f32(small, vdupq_n_f32(0.0F), scaled)};
}

template <>
struct Vec128::Wide<DType::kFloat32> {
  static constexpr int32_t kPacked = 1, kBytes = 4;
  template <int32_t j>
  static Vec128 get(const std::byte* row, int32_t n) {
    return load(reinterpret_cast<const float*>(row) + n);
  }
};

template <>
struct Vec128::Wide<DType::kFloat16> {
  static constexpr int32_t kPacked = 1, kBytes = 2;
  template <int32_t j>
  static Vec128 get(const std::byte* row, int32_t n) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(row) + n)))};
  }
};

template <>
struct Vec128::Wide<DType::kBFloat16> {
  static constexpr int32_t kPacked = 2, kBytes = 2;
  template <int32_t j>
  static Vec128 get(const std::byte* row, int32_t n) {
    const uint32x4_t x = vld1q_u32(reinterpret_cast<const uint32_t*>(row) + n);
    return {vreinterpretq_f32_u32(j == 0 ? vshlq_n_u32(x, 16) : vandq_u32(x, vdupq_n_u32(0xFFFF0000U)))};
  }
};

template <>
struct Vec128::Wide<DType::kInt8> {
  static constexpr int32_t kPacked = 4, kBytes = 1;
  template <int32_t j>
  static Vec128 get(const std::byte* row, int32_t n) {
    const int32x4_t x = vld1q_s32(reinterpret_cast<const int32_t*>(row) + n);
    return {vcvtq_f32_s32(vshrq_n_s32(j == 3 ? x : vshlq_n_s32(x, 24 - 8 * (j == 3 ? 2 : j)), 24))};
  }
};

}  // namespace

StripKernel neon_strip(DType kv, DType) { return fma_strip<Vec128>(kv); }

}  // namespace neo
