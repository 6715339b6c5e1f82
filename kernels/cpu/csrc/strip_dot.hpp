// What the loops with dot-product instructions and with tiles share: q and weights in the forms that both multiply.
// Included by one translation unit per instruction set; all of it is internal to each.
#pragma once

#include "strip_softmax.hpp"
#include "vec_avx512.hpp"

namespace neo {
namespace {

inline constexpr int32_t kLine = 64;  // bytes of a packed row: 16 tokens (K) or dims (V) of 4 bytes

inline void store_bf16(const float* from, float scale, int32_t count, void* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int32_t i = 0; i < count; i += 16) {
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + i), factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + i), reinterpret_cast<__m256i>(x));
  }
}

inline void fold_accs(float* acc, float weight, const float* other, float its_weight, int32_t count) {
  const __m512 mine = _mm512_set1_ps(weight);
  const __m512 its = _mm512_set1_ps(its_weight);
  for (int32_t i = 0; i < count; i += 16) {
    const __m512 scaled = _mm512_mul_ps(its, _mm512_loadu_ps(other + i));
    _mm512_storeu_ps(acc + i, _mm512_fmadd_ps(mine, _mm512_loadu_ps(acc + i), scaled));
  }
}

// What can write results of this type, if anything faster than plain C++.
inline decltype(StripKernel::store) store_of(DType activation) {
  return activation == DType::kBFloat16 ? store_bf16 : nullptr;
}

// bf16: weights are rounded to 8 bits, as FlashAttention does; q is exact.
struct Bf16Operands {
  static void prepare(HeadState& state) {
    for (int32_t i = 0; i < state.group * state.dim; i += 16) {
      const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(state.q + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(state.q_packed + i * 2), reinterpret_cast<__m256i>(x));
    }
  }

  struct Weights {
    alignas(64) uint16_t bits[kMaxGroup][64];
    void start(const Strip&) {}
  };

  static void weigh(HeadState& state, const Strip& strip, int32_t h, float* row, Weights& weights) {
    weigh_head<Vec512>(state, strip, h, row);
    for (int32_t t = 0; t < kStripTokens; t += 16) {
      const __m256bh x = _mm512_cvtneps_pbh(_mm512_load_ps(row + t));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights.bits[h] + t), reinterpret_cast<__m256i>(x));
    }
  }
};

// int8: q and weights are cut into two bytes each, 16 bits in all, so that they add no error to speak of.
struct Int8Operands {
  // q = q_scale * (256 high + low), both signed. VPDPBUSD wants one unsigned side: K is read as K + 128, and
  // 128 * sum(q) is taken off first.
  static void prepare(HeadState& state) {
    for (int32_t h = 0; h < state.group; ++h) {
      const float* q = state.q + h * state.dim;
      auto* high = reinterpret_cast<int8_t*>(state.q_packed + h * state.dim * 2);
      int8_t* low = high + state.dim;
      __m512 largest = _mm512_setzero_ps();
      __m512 poison = _mm512_setzero_ps();
      for (int32_t i = 0; i < state.dim; i += 16) {
        const __m512 x = _mm512_loadu_ps(q + i);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
        poison = _mm512_fmadd_ps(x, _mm512_setzero_ps(), poison);
      }
      const float bound = _mm512_reduce_max_ps(largest);
      const __m512 inverse = _mm512_set1_ps(bound > 0.0F ? 32512.0F / bound : 0.0F);
      __m512i high_sum = _mm512_setzero_si512();
      __m512i low_sum = _mm512_setzero_si512();
      for (int32_t i = 0; i < state.dim; i += 16) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(q + i), inverse));
        const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        const __m512i rest = _mm512_sub_epi32(x, _mm512_slli_epi32(top, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(top));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(rest));
        high_sum = _mm512_add_epi32(high_sum, top);
        low_sum = _mm512_add_epi32(low_sum, rest);
      }
      // A NaN or infinity in q must show in the scores.
      state.q_scale[h] = bound / 32512.0F + _mm512_reduce_add_ps(poison);
      state.q_sum[h][0] = _mm512_reduce_add_epi32(high_sum);
      state.q_sum[h][1] = _mm512_reduce_add_epi32(low_sum);
    }
  }

  // weight * V scale = unit * (256 high + low), both unsigned. No weight exceeds 1, so the largest V scale sets the
  // unit.
  struct Weights {
    alignas(64) uint8_t bytes[kMaxGroup][2][64];  // high, low
    alignas(64) float factor[64];
    float unit;

    void start(const Strip& strip) {
      prefetch_scales(strip);
      const uint64_t attended = (~uint64_t{0} >> (64 - strip.end)) & (~uint64_t{0} << strip.begin);
      __m512 scales[kStripTiles];
      __m512 largest = _mm512_setzero_ps();
      __m512 poison = _mm512_setzero_ps();
      for (int32_t t = 0; t < kStripTiles; ++t) {
        const auto mask = static_cast<__mmask16>(attended >> (16 * t));
        scales[t] = _mm512_maskz_loadu_ps(mask, strip.tiles[t].v_scale);
        largest = _mm512_max_ps(largest, scales[t]);
        poison = _mm512_fmadd_ps(scales[t], _mm512_setzero_ps(), poison);
      }
      const float bound = _mm512_reduce_max_ps(largest);
      const __m512 inverse = _mm512_set1_ps(bound > 0.0F ? 65280.0F / bound : 0.0F);
      for (int32_t t = 0; t < kStripTiles; ++t) {
        _mm512_store_ps(factor + 16 * t, _mm512_mul_ps(scales[t], inverse));
      }
      unit = bound / 65280.0F + _mm512_reduce_add_ps(poison);  // a NaN scale has to show
    }
  };

  static void weigh(HeadState& state, const Strip& strip, int32_t h, float* row, Weights& weights) {
    weigh_head<Vec512>(state, strip, h, row);
    for (int32_t t = 0; t < kStripTokens; t += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(row + t), _mm512_load_ps(weights.factor + t));
      const __m512i x = _mm512_cvtps_epi32(scaled);
      _mm_store_si128(reinterpret_cast<__m128i*>(weights.bytes[h][0] + t),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(weights.bytes[h][1] + t), _mm512_cvtepi32_epi8(x));
    }
  }
};

}  // namespace
}  // namespace neo
