// Vector loops with dot-product instructions. bf16: VDPBF16PS adds pairs of exact products in fp32; q and K are not
// rounded, weights are (to 8 bits, as FlashAttention does). int8: VPDPBUSD adds quads of 8-bit products; q and weights
// are cut into two bytes each, 16 bits in all, so that they add no error to speak of. A lone fp32 multiply-add per
// element and head cannot keep up with memory on cores with 256-bit datapaths (docs/perf-log.md). Lines of four tiles
// are read side by side, V's as well as K's: that too keeps memory busier than tile after tile.
#include "strip_dot.hpp"

namespace neo {
namespace {

inline int32_t word(const void* at) {
  int32_t value;
  __builtin_memcpy(&value, at, sizeof(value));
  return value;
}

inline __m512i four_bytes(const void* at) { return _mm512_set1_epi32(word(at)); }

// sum + a . b. Written out because GCC 12 copies the accumulators of its own intrinsics around in every step of a loop.
inline __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// The same with `a` unsigned and `b` signed bytes.
inline __m512i add_quads(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
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

// How many lines to prefetch for every four that one pass over heads reads, so that `passes` together prefetch a strip.
constexpr int32_t share_of(int32_t passes) { return passes == 1 ? 4 : passes == 2 ? 2 : 1; }

// ---- bf16

struct Bf16 : Bf16Operands {
  static constexpr int32_t kBytes = 2;
  static constexpr int32_t kHeads = 4;       // at once: 16 accumulators of the 32 registers
  static constexpr int32_t kValueHeads = 2;  // likewise, with all columns of 128 dims: V goes by in order of addresses
  static constexpr int32_t kColumns = 8;

  template <int32_t heads, int32_t tiles, int32_t share>
  static void scores(const HeadState& state, const Strip& strip, Fetch& fetch, int32_t head, float (*out)[64]) {
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
      }
      fetch.more<share>();
      for (int32_t h = 0; h < heads; ++h) {
        const __m512i pair = four_bytes(q + h * state.dim * 2 + i * 4);
        for (int32_t t = 0; t < tiles; ++t) {
          acc[h][t] = add_pairs(acc[h][t], k[t], pair);
        }
      }
    }
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t t = 0; t < tiles; ++t) {
        _mm512_store_ps(out[head + h] + t * 16, _mm512_mul_ps(acc[h][t], _mm512_set1_ps(state.scale)));
      }
    }
  }

  // Adds `tiles` tiles from `first` on, in `columns` vectors of 16 dims.
  template <int32_t heads, int32_t columns, int32_t tiles, int32_t share>
  static void values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t column, int32_t head, int32_t first,
                     const Weights& weights) {
    __m512 acc[heads][columns];
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        acc[h][c] = _mm512_loadu_ps(state.acc + (head + h) * state.dim + (column + c) * 16);
      }
    }
    const std::ptrdiff_t stride = state.dim / 16 * kLine;
    std::ptrdiff_t at = column * kLine;
#pragma GCC unroll 1
    for (int32_t i = 0; i < 8; ++i, at += stride) {
      __m512i pair[heads][tiles];
      for (int32_t h = 0; h < heads; ++h) {
        for (int32_t t = 0; t < tiles; ++t) {
          pair[h][t] = four_bytes(weights.bits[head + h] + (first + t) * 16 + i * 2);
        }
      }
#pragma GCC unroll 8
      for (int32_t c = 0; c < columns; ++c) {
        for (int32_t t = 0; t < tiles; ++t) {
          const __m512i v = _mm512_loadu_si512(strip.tiles[first + t].v + at + c * kLine);
          for (int32_t h = 0; h < heads; ++h) {
            acc[h][c] = add_pairs(acc[h][c], v, pair[h][t]);
          }
        }
        fetch.more<share>();
      }
    }
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t c = 0; c < columns; ++c) {
        _mm512_storeu_ps(state.acc + (head + h) * state.dim + (column + c) * 16, acc[h][c]);
      }
    }
  }
};

// ---- int8

struct Int8 : Int8Operands {
  static constexpr int32_t kBytes = 1;
  static constexpr int32_t kHeads = 2;  // high and low bytes: 16 accumulators again
  static constexpr int32_t kValueHeads = 2;
  static constexpr int32_t kColumns = 4;

  template <int32_t heads, int32_t tiles, int32_t share>
  static void scores(const HeadState& state, const Strip& strip, Fetch& fetch, int32_t head, float (*out)[64]) {
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
      }
      fetch.more<share>();
      for (int32_t h = 0; h < heads; ++h) {
        const std::byte* bytes = q + h * state.dim * 2 + i * 4;
        const __m512i q_high = four_bytes(bytes);
        const __m512i q_low = four_bytes(bytes + state.dim);
        for (int32_t t = 0; t < tiles; ++t) {
          high[h][t] = add_quads(high[h][t], k[t], q_high);
          low[h][t] = add_quads(low[h][t], k[t], q_low);
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

  template <int32_t heads, int32_t columns, int32_t tiles, int32_t share>
  static void values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t column, int32_t head, int32_t first,
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
    std::ptrdiff_t at = column * kLine;
#pragma GCC unroll 1
    for (int32_t i = 0; i < 4; ++i, at += stride) {
#pragma GCC unroll 1
      for (int32_t t = first; t < first + tiles; ++t) {
        __m512i v[columns];
        for (int32_t c = 0; c < columns; ++c) {
          v[c] = _mm512_loadu_si512(strip.tiles[t].v + at + c * kLine);
        }
        fetch.more<share>();
        for (int32_t h = 0; h < heads; ++h) {
          const __m512i w_high = four_bytes(weights.bytes[head + h][0] + t * 16 + i * 4);
          const __m512i w_low = four_bytes(weights.bytes[head + h][1] + t * 16 + i * 4);
          for (int32_t c = 0; c < columns; ++c) {
            high[h][c] = add_quads(high[h][c], w_high, v[c]);
            low[h][c] = add_quads(low[h][c], w_low, v[c]);
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

template <typename Kv, int32_t heads, int32_t columns, int32_t share>
inline void column_values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t column, int32_t head,
                          const typename Kv::Weights& weights) {
  if (strip.count == kStripTiles) {
    Kv::template values<heads, columns, kStripTiles, share>(state, strip, fetch, column, head, 0, weights);
    return;
  }
  for (int32_t t = 0; t < strip.count; ++t) {
    Kv::template values<heads, columns, 1, share>(state, strip, fetch, column, head, t, weights);
  }
}

template <typename Kv, int32_t heads, int32_t share>
inline void all_values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t head,
                       const typename Kv::Weights& weights) {
  const int32_t columns = state.dim / 16;
  int32_t column = 0;
  for (; column + Kv::kColumns <= columns; column += Kv::kColumns) {
    column_values<Kv, heads, Kv::kColumns, share>(state, strip, fetch, column, head, weights);
  }
  for (; column + 4 <= columns; column += 4) {
    column_values<Kv, heads, 4, share>(state, strip, fetch, column, head, weights);
  }
  for (; column < columns; ++column) {
    column_values<Kv, heads, 1, share>(state, strip, fetch, column, head, weights);
  }
}

// `passes` over heads: how many for K, or 3 for more.
template <typename Kv, int32_t passes>
void attend_group(HeadState& state, const Strip& strip) {
  constexpr int32_t kShare = share_of(passes);
  constexpr int32_t kValueShare = share_of(passes * Kv::kHeads / Kv::kValueHeads);
  alignas(64) float scores[kMaxGroup][64];
  typename Kv::Weights weights;
  weights.start(strip);
  Fetch fetch(strip, state.dim * kTileTokens * Kv::kBytes);
  for (int32_t head = 0; head < state.group; head += Kv::kHeads) {
    with_count<Kv::kHeads>(state.group - head, [&]<int32_t heads>() {
      if (strip.count == 1) {
        Kv::template scores<heads, 1, kShare>(state, strip, fetch, head, scores);
      } else {
        Kv::template scores<heads, kStripTiles, kShare>(state, strip, fetch, head, scores);
      }
    });
  }
  for (int32_t head = 0; head < state.group; ++head) {
    fetch.more<4>();  // memory would be idle meanwhile
    fetch.more<4>();
    Kv::weigh(state, strip, head, scores[head], weights);
  }
  for (int32_t head = 0; head < state.group; head += Kv::kValueHeads) {
    with_count<Kv::kValueHeads>(state.group - head, [&]<int32_t heads>() {
      all_values<Kv, heads, kValueShare>(state, strip, fetch, head, weights);
    });
  }
}

template <typename Kv>
void attend(HeadState& state, const Strip& strip) {
  const int32_t passes = (state.group + Kv::kHeads - 1) / Kv::kHeads;
  if (passes == 1) {
    attend_group<Kv, 1>(state, strip);
  } else if (passes == 2) {
    attend_group<Kv, 2>(state, strip);
  } else {
    attend_group<Kv, 3>(state, strip);
  }
}

}  // namespace

StripKernel avx512bf16_strip(DType kv, DType activation) {
  if (kv == DType::kBFloat16 && activation == DType::kBFloat16) {
    return {Bf16::prepare, attend<Bf16>, store_bf16, fold_accs};
  }
  if (kv == DType::kInt8) {
    return {Int8::prepare, attend<Int8>, store_of(activation), fold_accs};
  }
  return {};
}

}  // namespace neo
