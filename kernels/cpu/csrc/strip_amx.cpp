// Loops with AMX tiles. The pool's layout is what a tile's right operand wants: 16 rows of 64 bytes, K for 16 tokens by
// 4 bytes of dims, V for 16 dims by 4 bytes of tokens. The left operand has a row for each query head of the group, so
// that all of them share one read of K and V and the arithmetic is a few tile products a strip. Operands are those of
// strip_avx512bf16.cpp, bit by bit; only the order of sums differs.
#include "amx_tiles.hpp"
#include "strip_dot.hpp"

namespace neo {
namespace {

constexpr int32_t kColumn = 16;  // dims of a V line

// To the first-level cache: 2-5% faster than to the second on the only kind of CPU that has tiles (docs/perf-log.md).
template <int32_t lines>
inline void fetch_lines(Fetch& fetch) {
  fetch.more<lines, 3>();
}

// The product of an operand of rows of q and a tile of the strip's K is added to tile `c`.
template <int32_t c, int32_t a, int32_t b, typename Kv>
inline void score_tile(Tiles& tiles, const Strip& strip, Fetch& fetch, std::ptrdiff_t at) {
  tiles.load<b>(strip.tiles[c].k + at, kLine);
  Kv::template score<c, a, b>(tiles);
  fetch_lines<8>(fetch);
  fetch_lines<8>(fetch);
}

// Tiles 4, 5 are full operands, 6, 7 cut ones.
template <int32_t a, int32_t b, typename Kv>
inline void score_tiles(Tiles& tiles, const Strip& strip, Fetch& fetch, const void* q, std::ptrdiff_t q_stride,
                        std::ptrdiff_t at) {
  tiles.load<a>(q, q_stride);
  score_tile<0, a, b, Kv>(tiles, strip, fetch, at);
  score_tile<1, a, b, Kv>(tiles, strip, fetch, at);
  score_tile<2, a, b, Kv>(tiles, strip, fetch, at);
  score_tile<3, a, b, Kv>(tiles, strip, fetch, at);
}

// [rows, 64] sums of q (rows of `q_stride` bytes) with the strip's K. Four bytes of dims are a line of K.
template <typename Kv>
inline void multiply_keys(Tiles& tiles, const Strip& strip, Fetch& fetch, const std::byte* q, std::ptrdiff_t q_stride,
                          int32_t lines, void* out) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  int32_t line = 0;
  for (; line + 16 <= lines; line += 16) {
    score_tiles<4, 5, Kv>(tiles, strip, fetch, q + 4 * line, q_stride, line * kLine);
  }
  for (; line < lines; line += Kv::kLines) {
    score_tiles<6, 7, Kv>(tiles, strip, fetch, q + 4 * line, q_stride, line * kLine);
  }
  auto* scores = static_cast<std::byte*>(out);
  tiles.store<0>(scores, 256);
  tiles.store<1>(scores + 64, 256);
  tiles.store<2>(scores + 128, 256);
  tiles.store<3>(scores + 192, 256);
}

// The product of the weights of a tile's tokens and a column of its V is added to tile `c`.
template <int32_t c, typename Kv>
inline void weigh_column(Tiles& tiles, Fetch& fetch, const std::byte* v, std::ptrdiff_t stride) {
  tiles.load<7>(v + c * kLine, stride);
  Kv::template weighted<c, 6, 7>(tiles);
  fetch_lines<Kv::kLines>(fetch);
}

// Adds weights (rows of `stride` bytes, `token_bytes` a token) times V of `columns` columns from `column` on to tiles 0
// to 3. A line of V is four bytes of tokens.
template <typename Kv, int32_t columns>
inline void multiply_values(Tiles& tiles, const Strip& strip, Fetch& fetch, const void* weights, std::ptrdiff_t stride,
                            int32_t token_bytes, int32_t column, int32_t dim) {
  const std::ptrdiff_t v_stride = dim / kColumn * kLine;
  for (int32_t t = 0; t < strip.count; ++t) {
    const std::byte* v = strip.tiles[t].v + column * kLine;
    tiles.load<6>(static_cast<const std::byte*>(weights) + t * kTileTokens * token_bytes, stride);
    weigh_column<0, Kv>(tiles, fetch, v, v_stride);
    if constexpr (columns == 4) {
      weigh_column<1, Kv>(tiles, fetch, v, v_stride);
      weigh_column<2, Kv>(tiles, fetch, v, v_stride);
      weigh_column<3, Kv>(tiles, fetch, v, v_stride);
    }
  }
}

// Tiles 0 to 3 have `rows` rows of 64 bytes; 4 and 5 are full operands, 6 and 7 cut ones of `lines` lines.
inline void configure(int32_t rows, int32_t lines) {
  TileShapes shapes;
  for (int32_t tile = 0; tile < 4; ++tile) {
    shapes.set(tile, rows, 64);
  }
  shapes.set(4, rows, 64);
  shapes.set(5, 16, 64);
  shapes.set(6, rows, lines * 4);
  shapes.set(7, lines, 64);
  Tiles::configure(shapes);
}

// ---- bf16: 16 tokens of V are 8 lines, and so is what K has over where dim is no multiple of 32

struct Bf16 : Bf16Operands {
  static constexpr int32_t kBytes = 2;
  static constexpr int32_t kLines = 8;

  template <int32_t c, int32_t a, int32_t b>
  static void score(Tiles& tiles) {
    tiles.dot_bf16<c, a, b>();
  }
  template <int32_t c, int32_t a, int32_t b>
  static void weighted(Tiles& tiles) {
    tiles.dot_bf16<c, a, b>();
  }

  static void scores(Tiles& tiles, const HeadState& state, const Strip& strip, Fetch& fetch, float (*out)[64]) {
    multiply_keys<Bf16>(tiles, strip, fetch, state.q_packed, state.dim * 2, state.dim / 2, out);
    const __m512 scale = _mm512_set1_ps(state.scale);
    for (int32_t h = 0; h < state.group; ++h) {
      for (int32_t t = 0; t < kStripTokens; t += 16) {
        _mm512_store_ps(out[h] + t, _mm512_mul_ps(_mm512_load_ps(out[h] + t), scale));
      }
    }
  }

  template <int32_t columns>
  static void values(Tiles& tiles, HeadState& state, const Strip& strip, Fetch& fetch, const Weights& weights,
                     int32_t column) {
    const std::ptrdiff_t stride = state.dim * sizeof(float);
    float* acc = state.acc + column * kColumn;
    tiles.load<0>(acc, stride);
    if constexpr (columns == 4) {
      tiles.load<1>(acc + 16, stride);
      tiles.load<2>(acc + 32, stride);
      tiles.load<3>(acc + 48, stride);
    }
    multiply_values<Bf16, columns>(tiles, strip, fetch, weights.bits, sizeof(weights.bits[0]), 2, column, state.dim);
    tiles.store<0>(acc, stride);
    if constexpr (columns == 4) {
      tiles.store<1>(acc + 16, stride);
      tiles.store<2>(acc + 32, stride);
      tiles.store<3>(acc + 48, stride);
    }
  }
  static int32_t rows(const HeadState& state) { return state.group; }
};

// ---- int8: high and low bytes of q and weights are rows side by side, so 8 heads fill a tile; 16 tokens of V are 4
// lines

struct Int8 : Int8Operands {
  static constexpr int32_t kBytes = 1;
  static constexpr int32_t kLines = 4;
  static constexpr int32_t kHeads = 8;  // at once

  template <int32_t c, int32_t a, int32_t b>
  static void score(Tiles& tiles) {
    tiles.dot_signed<c, a, b>();
  }
  template <int32_t c, int32_t a, int32_t b>
  static void weighted(Tiles& tiles) {
    tiles.dot_unsigned_signed<c, a, b>();
  }

  // 256 high + low of head h.
  static __m512 joined(const int32_t (*sums)[64], int32_t h, int32_t at) {
    const __m512i high = _mm512_load_si512(sums[2 * h] + at);
    const __m512i low = _mm512_load_si512(sums[2 * h + 1] + at);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }

  static void scores(Tiles& tiles, const HeadState& state, const Strip& strip, Fetch& fetch, float (*out)[64]) {
    alignas(64) int32_t sums[2 * kMaxGroup][64];
    for (int32_t h = 0; h < state.group; h += kHeads) {
      const std::byte* q = state.q_packed + h * state.dim * 2;
      multiply_keys<Int8>(tiles, strip, fetch, q, state.dim, state.dim / 4, sums[2 * h]);
    }
    for (int32_t h = 0; h < state.group; ++h) {
      const __m512 scale = _mm512_set1_ps(state.scale * state.q_scale[h]);
      for (int32_t t = 0; t < kStripTiles; ++t) {
        const __m512 token = _mm512_mul_ps(_mm512_loadu_ps(strip.tiles[t].k_scale), scale);
        _mm512_store_ps(out[h] + t * 16, _mm512_mul_ps(joined(sums, h, t * 16), token));
      }
    }
  }

  template <int32_t columns>
  static void values(Tiles& tiles, HeadState& state, const Strip& strip, Fetch& fetch, const Weights& weights,
                     int32_t column) {
    alignas(64) int32_t sums[2 * kMaxGroup][64];
    for (int32_t h = 0; h < state.group; h += kHeads) {
      tiles.zero<0>();
      tiles.zero<1>();
      tiles.zero<2>();
      tiles.zero<3>();
      multiply_values<Int8, columns>(tiles, strip, fetch, weights.bytes[h], 64, 1, column, state.dim);
      tiles.store<0>(sums[2 * h], sizeof(sums[0]));
      if constexpr (columns == 4) {
        tiles.store<1>(sums[2 * h] + 16, sizeof(sums[0]));
        tiles.store<2>(sums[2 * h] + 32, sizeof(sums[0]));
        tiles.store<3>(sums[2 * h] + 48, sizeof(sums[0]));
      }
    }
    const __m512 unit = _mm512_set1_ps(weights.unit);
    for (int32_t h = 0; h < state.group; ++h) {
      float* acc = state.acc + h * state.dim + column * kColumn;
      for (int32_t c = 0; c < columns * kColumn; c += 16) {
        _mm512_storeu_ps(acc + c, _mm512_fmadd_ps(joined(sums, h, c), unit, _mm512_loadu_ps(acc + c)));
      }
    }
  }
  // Rows of heads that are not there are computed and left alone.
  static int32_t rows(const HeadState& state) { return 2 * (state.group < kHeads ? state.group : kHeads); }
};

// ---- either

template <typename Kv>
void prepare(HeadState& state) {
  Kv::prepare(state);
  configure(Kv::rows(state), Kv::kLines);  // once a head: it waits for all that went before
}

template <typename Kv>
void attend(HeadState& state, const Strip& strip) {
  alignas(64) float scores[kMaxGroup][64];
  typename Kv::Weights weights;
  weights.start(strip);
  Fetch fetch(strip, state.dim * kTileTokens * Kv::kBytes);
  Tiles tiles;
  Kv::scores(tiles, state, strip, fetch, scores);
  for (int32_t h = 0; h < state.group; ++h) {
    fetch_lines<8>(fetch);
    Kv::weigh(state, strip, h, scores[h], weights);
  }
  const int32_t columns = state.dim / kColumn;
  int32_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    Kv::template values<4>(tiles, state, strip, fetch, weights, column);
  }
  for (; column < columns; ++column) {
    Kv::template values<1>(tiles, state, strip, fetch, weights, column);
  }
}

}  // namespace

StripKernel amx_strip(DType kv, DType activation) {
  if (kv == DType::kBFloat16 && activation == DType::kBFloat16) {
    return {prepare<Bf16>, attend<Bf16>, store_bf16, fold_accs, Tiles::release};
  }
  if (kv == DType::kInt8) {
    return {prepare<Int8>, attend<Int8>, store_of(activation), fold_accs, Tiles::release};
  }
  return {};
}

}  // namespace neo
