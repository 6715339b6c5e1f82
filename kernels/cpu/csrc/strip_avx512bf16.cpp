// Vector loops with dot-product instructions. bf16: VDPBF16PS adds pairs of exact products in fp32; q and K are not
// rounded, weights are (to 8 bits, as FlashAttention does). int8: VPDPBUSD adds quads of 8-bit products; q and weights
// are cut into two bytes each, 16 bits in all, so that they add no error to speak of. A lone fp32 multiply-add per
// element and head cannot keep up with memory on cores with 256-bit datapaths (docs/perf-log.md).
#include "strip_dot.hpp"

namespace neo {
namespace {

inline int32_t word(const void* at) {
  int32_t value;
  __builtin_memcpy(&value, at, sizeof(value));
  return value;
}

// Calls f<n>() with n = min(count, kMost).
template <int32_t kMost, typename F>
inline void with_count(int32_t count, F&& f) {
  if constexpr (kMost == 1) {
    f.template operator()<1>();
  } else if (count >= kMost) {
    f.template operator()<kMost>();
  } else {
    with_count<kMost - 1>(count, f);
  }
}

// ---- bf16

struct Bf16 : Bf16Operands {
  static constexpr int32_t kHeads = 4;      // at once: 16 accumulators of the 32 registers
  static constexpr int32_t kEarlyRows = 3;  // of the 8 lines that a column of V has

  template <int32_t heads, int32_t tiles>
  static void scores(const HeadState& state, const Strip& strip, const Ahead& ahead, int32_t head, float (*out)[64]) {
    __m512 acc[heads][tiles];
    for (auto& row : acc) {
      for (__m512& x : row) {
        x = _mm512_setzero_ps();
      }
    }
    const std::byte* q = state.q_packed + head * state.dim * 2;
    const int32_t rows = state.dim / 2;
#pragma GCC unroll 1  // unrolled, GCC 12 runs out of registers for addresses and spills vectors
    for (int32_t i = 0; i < rows; ++i) {
      __m512i k[tiles];
      for (int32_t t = 0; t < tiles; ++t) {
        k[t] = _mm512_loadu_si512(strip.tiles[t].k + i * kLine);
        __builtin_prefetch(ahead.tiles[t].k + i * kLine, 0, 2);
      }
      for (int32_t h = 0; h < heads; ++h) {
        const __m512i pair = _mm512_set1_epi32(word(q + h * state.dim * 2 + i * 4));
        for (int32_t t = 0; t < tiles; ++t) {
          acc[h][t] = _mm512_dpbf16_ps(acc[h][t], reinterpret_cast<__m512bh>(k[t]), reinterpret_cast<__m512bh>(pair));
        }
      }
    }
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t t = 0; t < tiles; ++t) {
        _mm512_store_ps(out[head + h] + t * 16, _mm512_mul_ps(acc[h][t], _mm512_set1_ps(state.scale)));
      }
    }
  }

  template <int32_t heads, int32_t columns>
  static void values(HeadState& state, const Strip& strip, const Ahead& ahead, int32_t column, int32_t head,
                     const uint16_t (*weights)[64]) {
    __m512 acc[heads][columns];
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        acc[h][c] = _mm512_loadu_ps(state.acc + (head + h) * state.dim + (column + c) * 16);
      }
    }
    const std::ptrdiff_t stride = state.dim / 16 * kLine;
    for (int32_t t = 0; t < strip.count; ++t) {
      const std::byte* row = strip.tiles[t].v + column * kLine;
      const std::byte* next = ahead.tiles[t].v + column * kLine;
#pragma GCC unroll 1
      for (int32_t i = 0; i < 8; ++i, row += stride, next += stride) {
        __m512i v[columns];
        for (int32_t c = 0; c < columns; ++c) {
          v[c] = _mm512_loadu_si512(row + c * kLine);
          if (i >= kEarlyRows) {
            __builtin_prefetch(next + c * kLine, 0, 2);
          }
        }
        for (int32_t h = 0; h < heads; ++h) {
          const __m512i pair = _mm512_set1_epi32(word(weights[head + h] + t * 16 + i * 2));
          for (int32_t c = 0; c < columns; ++c) {
            acc[h][c] = _mm512_dpbf16_ps(acc[h][c], reinterpret_cast<__m512bh>(v[c]), reinterpret_cast<__m512bh>(pair));
          }
        }
      }
    }
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        _mm512_storeu_ps(state.acc + (head + h) * state.dim + (column + c) * 16, acc[h][c]);
      }
    }
  }

  template <int32_t heads, int32_t columns>
  static void values(HeadState& state, const Strip& strip, const Ahead& ahead, int32_t column, int32_t head,
                     const Weights& weights) {
    values<heads, columns>(state, strip, ahead, column, head, weights.bits);
  }
};

// ---- int8

struct Int8 : Int8Operands {
  static constexpr int32_t kHeads = 2;      // high and low bytes: 16 accumulators again
  static constexpr int32_t kEarlyRows = 1;  // of 4

  template <int32_t heads, int32_t tiles>
  static void scores(const HeadState& state, const Strip& strip, const Ahead& ahead, int32_t head, float (*out)[64]) {
    __m512i high[heads][tiles];
    __m512i low[heads][tiles];
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t t = 0; t < tiles; ++t) {
        high[h][t] = _mm512_set1_epi32(-128 * state.q_sum[head + h][0]);
        low[h][t] = _mm512_set1_epi32(-128 * state.q_sum[head + h][1]);
      }
    }
    const std::byte* q = state.q_packed + head * state.dim * 2;
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const int32_t rows = state.dim / 4;
#pragma GCC unroll 1
    for (int32_t i = 0; i < rows; ++i) {
      __m512i k[tiles];
      for (int32_t t = 0; t < tiles; ++t) {
        k[t] = _mm512_xor_si512(_mm512_loadu_si512(strip.tiles[t].k + i * kLine), flip);
        __builtin_prefetch(ahead.tiles[t].k + i * kLine, 0, 2);
      }
      for (int32_t h = 0; h < heads; ++h) {
        const std::byte* bytes = q + h * state.dim * 2 + i * 4;
        const __m512i q_high = _mm512_set1_epi32(word(bytes));
        const __m512i q_low = _mm512_set1_epi32(word(bytes + state.dim));
        for (int32_t t = 0; t < tiles; ++t) {
          high[h][t] = _mm512_dpbusd_epi32(high[h][t], k[t], q_high);
          low[h][t] = _mm512_dpbusd_epi32(low[h][t], k[t], q_low);
        }
      }
    }
    for (int32_t h = 0; h < heads; ++h) {
      const __m512 scale = _mm512_set1_ps(state.scale * state.q_scale[head + h]);
      for (int32_t t = 0; t < tiles; ++t) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[h][t], 8), low[h][t]);
        const __m512 token = _mm512_mul_ps(_mm512_loadu_ps(strip.tiles[t].k_scale), scale);
        _mm512_store_ps(out[head + h] + t * 16, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), token));
      }
    }
  }

  template <int32_t heads, int32_t columns>
  static void values(HeadState& state, const Strip& strip, const Ahead& ahead, int32_t column, int32_t head,
                     const Weights& weights) {
    __m512i high[heads][columns];
    __m512i low[heads][columns];
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        high[h][c] = _mm512_setzero_si512();
        low[h][c] = _mm512_setzero_si512();
      }
    }
    const std::ptrdiff_t stride = state.dim / 16 * kLine;
    for (int32_t t = 0; t < strip.count; ++t) {
      const std::byte* row = strip.tiles[t].v + column * kLine;
      const std::byte* next = ahead.tiles[t].v + column * kLine;
#pragma GCC unroll 1
      for (int32_t i = 0; i < 4; ++i, row += stride, next += stride) {
        __m512i v[columns];
        for (int32_t c = 0; c < columns; ++c) {
          v[c] = _mm512_loadu_si512(row + c * kLine);
          if (i >= kEarlyRows) {
            __builtin_prefetch(next + c * kLine, 0, 2);
          }
        }
        for (int32_t h = 0; h < heads; ++h) {
          const __m512i w_high = _mm512_set1_epi32(word(weights.high[head + h] + t * 16 + i * 4));
          const __m512i w_low = _mm512_set1_epi32(word(weights.low[head + h] + t * 16 + i * 4));
          for (int32_t c = 0; c < columns; ++c) {
            high[h][c] = _mm512_dpbusd_epi32(high[h][c], w_high, v[c]);
            low[h][c] = _mm512_dpbusd_epi32(low[h][c], w_low, v[c]);
          }
        }
      }
    }
    const __m512 unit = _mm512_set1_ps(weights.unit);
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        float* acc = state.acc + (head + h) * state.dim + (column + c) * 16;
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[h][c], 8), low[h][c]);
        _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, _mm512_loadu_ps(acc)));
      }
    }
  }
};

// ---- either

template <typename Kv, int32_t heads>
inline void attend_heads(HeadState& state, const Strip& strip, int32_t head, float (*scores)[64],
                         typename Kv::Weights& weights) {
  constexpr int32_t kColumns = 4;
  const Ahead ahead = ahead_of(strip, head / Kv::kHeads, (state.group + Kv::kHeads - 1) / Kv::kHeads);
  if (strip.count == 1) {
    Kv::template scores<heads, 1>(state, strip, ahead, head, scores);
  } else {
    Kv::template scores<heads, kStripTiles>(state, strip, ahead, head, scores);
  }
  const int32_t early = Kv::kEarlyRows * state.dim / 16;
  for (int32_t h = 0; h < heads; ++h) {
    // Memory would be idle while scores become weights.
    for (int32_t t = h; t < kStripTiles; t += heads) {
      for (int32_t i = 0; i < early; ++i) {
        __builtin_prefetch(ahead.tiles[t].v + i * kLine, 0, 2);
      }
    }
    Kv::weigh(state, strip, head + h, scores[head + h], weights);
  }
  const int32_t columns = state.dim / 16;
  int32_t column = 0;
  for (; column + kColumns <= columns; column += kColumns) {
    Kv::template values<heads, kColumns>(state, strip, ahead, column, head, weights);
  }
  for (; column < columns; ++column) {
    Kv::template values<heads, 1>(state, strip, ahead, column, head, weights);
  }
}

template <typename Kv>
void attend(HeadState& state, const Strip& strip) {
  alignas(64) float scores[kMaxGroup][64];
  typename Kv::Weights weights;
  weights.start(strip);
  for (int32_t head = 0; head < state.group; head += Kv::kHeads) {
    with_count<Kv::kHeads>(state.group - head,
                           [&]<int32_t heads>() { attend_heads<Kv, heads>(state, strip, head, scores, weights); });
  }
}

}  // namespace

StripKernel avx512bf16_strip(DType kv, DType activation) {
  if (kv == DType::kBFloat16 && activation == DType::kBFloat16) {
    return {Bf16::prepare, attend<Bf16>};
  }
  if (kv == DType::kInt8) {
    return {Int8::prepare, attend<Int8>};
  }
  return {};
}

}  // namespace neo
