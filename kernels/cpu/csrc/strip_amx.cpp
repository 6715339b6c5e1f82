// Loops with AMX tiles. The pool's layout is what a tile's right operand wants: 16 rows of 64 bytes, K for 16 tokens by
// 4 bytes of dims, V for 16 dims by 4 bytes of tokens. The left operand has a row for each query head of the group, so
// that all of them share one read of K and V and the arithmetic is a few tile products a strip. Operands are those of
// strip_avx512bf16.cpp, bit by bit; only the order of sums differs.
#include "amx_tiles.hpp"
#include "strip_dot.hpp"

namespace neo {
namespace {

constexpr int32_t kColumn = 16;  // dims of a V line

inline void prefetch_lines(const std::byte* lines, int32_t count, std::ptrdiff_t stride) {
  for (int32_t i = 0; i < count; ++i) {
    __builtin_prefetch(lines + i * stride, 0, 2);
  }
}

// Four products of one left operand with the four tiles of a strip. `step`: 4, 5 are full tiles, 6, 7 cut ones.
template <int32_t a, int32_t b, typename Kv>
inline void four_tiles(Tiles& tiles, const Strip& strip, const void* q, std::ptrdiff_t q_stride, std::ptrdiff_t at) {
  tiles.load<a>(q, q_stride);
  tiles.load<b>(strip.tiles[0].k + at, kLine);
  Kv::template score<0, a, b>(tiles);
  tiles.load<b>(strip.tiles[1].k + at, kLine);
  Kv::template score<1, a, b>(tiles);
  tiles.load<b>(strip.tiles[2].k + at, kLine);
  Kv::template score<2, a, b>(tiles);
  tiles.load<b>(strip.tiles[3].k + at, kLine);
  Kv::template score<3, a, b>(tiles);
}

// [group, 64] sums of q (rows of `q_stride` bytes) with the strip's K. Four bytes of dims are a line of K.
template <typename Kv>
inline void multiply_keys(Tiles& tiles, const Strip& strip, const std::byte* q, std::ptrdiff_t q_stride, int32_t lines,
                          void* out) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  int32_t line = 0;
  for (; line + 16 <= lines; line += 16) {
    four_tiles<4, 5, Kv>(tiles, strip, q + 4 * line, q_stride, line * kLine);
    for (const Tile& next : strip.next) {
      prefetch_lines(next.k + line * kLine, 16, kLine);
    }
  }
  if (line < lines) {
    four_tiles<6, 7, Kv>(tiles, strip, q + 4 * line, q_stride, line * kLine);
    for (const Tile& next : strip.next) {
      prefetch_lines(next.k + line * kLine, lines - line, kLine);
    }
  }
  auto* scores = static_cast<std::byte*>(out);
  tiles.store<0>(scores, 256);
  tiles.store<1>(scores + 64, 256);
  tiles.store<2>(scores + 128, 256);
  tiles.store<3>(scores + 192, 256);
}

// Adds weights (rows of `stride` bytes, `token_bytes` a token) times V of `columns` columns from `column` on to tiles 0
// to 3. A line of V is four bytes of tokens.
template <typename Kv, int32_t columns>
inline void multiply_values(Tiles& tiles, const Strip& strip, const std::byte* weights, std::ptrdiff_t stride,
                            int32_t token_bytes, int32_t column, int32_t dim) {
  const std::ptrdiff_t v_stride = dim / kColumn * kLine;
  for (int32_t t = 0; t < strip.count; ++t) {
    const std::byte* v = strip.tiles[t].v + column * kLine;
    tiles.load<6>(weights + t * kTileTokens * token_bytes, stride);
    tiles.load<7>(v, v_stride);
    Kv::template weighted<0, 6, 7>(tiles);
    if constexpr (columns == 4) {
      tiles.load<7>(v + kLine, v_stride);
      Kv::template weighted<1, 6, 7>(tiles);
      tiles.load<7>(v + 2 * kLine, v_stride);
      Kv::template weighted<2, 6, 7>(tiles);
      tiles.load<7>(v + 3 * kLine, v_stride);
      Kv::template weighted<3, 6, 7>(tiles);
    }
  }
}

// The lines of V that come next, as many as a pass over `columns` columns has read.
inline void prefetch_values(const Strip& strip, int32_t column, int32_t columns, int32_t lines, int32_t dim) {
  for (const Tile& next : strip.next) {
    for (int32_t c = column; c < column + columns; ++c) {
      prefetch_lines(next.v + c * kLine, lines, dim / kColumn * kLine);
    }
  }
}

// Tiles 0 to 3 hold a row of 64 bytes for each head; 4 and 5 are full operands, 6 and 7 cut ones of `lines` lines.
inline TileShapes shapes(int32_t heads, int32_t lines) {
  TileShapes made;
  for (int32_t tile = 0; tile < 4; ++tile) {
    made.set(tile, heads, 64);
  }
  made.set(4, heads, 64);
  made.set(5, 16, 64);
  made.set(6, heads, lines * 4);
  made.set(7, lines, 64);
  return made;
}

// ---- bf16: 16 tokens of V are 8 lines, and so is what is left of K where dim is no multiple of 32

struct Bf16 : Bf16Operands {
  static constexpr int32_t kLines = 8;

  template <int32_t c, int32_t a, int32_t b>
  static void score(Tiles& tiles) {
    tiles.dot_bf16<c, a, b>();
  }
  template <int32_t c, int32_t a, int32_t b>
  static void weighted(Tiles& tiles) {
    tiles.dot_bf16<c, a, b>();
  }

  static void scores(Tiles& tiles, const HeadState& state, const Strip& strip, float (*out)[64]) {
    multiply_keys<Bf16>(tiles, strip, state.q_packed, state.dim * 2, state.dim / 2, out);
    const __m512 scale = _mm512_set1_ps(state.scale);
    for (int32_t h = 0; h < state.group; ++h) {
      for (int32_t t = 0; t < kStripTokens; t += 16) {
        _mm512_store_ps(out[h] + t, _mm512_mul_ps(_mm512_load_ps(out[h] + t), scale));
      }
    }
  }

  template <int32_t columns>
  static void values(Tiles& tiles, HeadState& state, const Strip& strip, const Weights& weights, int32_t column) {
    const std::ptrdiff_t stride = state.dim * sizeof(float);
    float* acc = state.acc + column * kColumn;
    tiles.load<0>(acc, stride);
    if constexpr (columns == 4) {
      tiles.load<1>(acc + 16, stride);
      tiles.load<2>(acc + 32, stride);
      tiles.load<3>(acc + 48, stride);
    }
    const auto* bits = reinterpret_cast<const std::byte*>(weights.bits);
    multiply_values<Bf16, columns>(tiles, strip, bits, sizeof(weights.bits[0]), 2, column, state.dim);
    prefetch_values(strip, column, columns, kLines, state.dim);
    tiles.store<0>(acc, stride);
    if constexpr (columns == 4) {
      tiles.store<1>(acc + 16, stride);
      tiles.store<2>(acc + 32, stride);
      tiles.store<3>(acc + 48, stride);
    }
  }
  static TileShapes key_shapes(const HeadState& state) { return shapes(state.group, kLines); }
  static TileShapes value_shapes(const HeadState& state) { return shapes(state.group, kLines); }
};

// ---- int8: high and low bytes of q and weights in passes of their own; 16 tokens of V are 4 lines

struct Int8 : Int8Operands {
  static constexpr int32_t kLines = 4;

  template <int32_t c, int32_t a, int32_t b>
  static void score(Tiles& tiles) {
    tiles.dot_signed<c, a, b>();
  }
  template <int32_t c, int32_t a, int32_t b>
  static void weighted(Tiles& tiles) {
    tiles.dot_unsigned_signed<c, a, b>();
  }

  static __m512 joined(const int32_t* high, const int32_t* low) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 8), _mm512_load_si512(low));
    return _mm512_cvtepi32_ps(sum);
  }

  static void scores(Tiles& tiles, const HeadState& state, const Strip& strip, float (*out)[64]) {
    alignas(64) int32_t high[kMaxGroup][64];
    alignas(64) int32_t low[kMaxGroup][64];
    const std::ptrdiff_t stride = state.dim * 2;
    multiply_keys<Int8>(tiles, strip, state.q_packed, stride, state.dim / 4, high);
    multiply_keys<Int8>(tiles, strip, state.q_packed + state.dim, stride, state.dim / 4, low);
    for (int32_t h = 0; h < state.group; ++h) {
      const __m512 scale = _mm512_set1_ps(state.scale * state.q_scale[h]);
      for (int32_t t = 0; t < kStripTiles; ++t) {
        const __m512 token = _mm512_mul_ps(_mm512_loadu_ps(strip.tiles[t].k_scale), scale);
        _mm512_store_ps(out[h] + t * 16, _mm512_mul_ps(joined(high[h] + t * 16, low[h] + t * 16), token));
      }
    }
  }

  template <int32_t columns>
  static void multiply(Tiles& tiles, const HeadState& state, const Strip& strip, const uint8_t (*weights)[64],
                       int32_t column, int32_t (*out)[64]) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    const auto* bytes = reinterpret_cast<const std::byte*>(weights);
    multiply_values<Int8, columns>(tiles, strip, bytes, sizeof(weights[0]), 1, column, state.dim);
    tiles.store<0>(out[0], sizeof(out[0]));
    tiles.store<1>(out[0] + 16, sizeof(out[0]));
    tiles.store<2>(out[0] + 32, sizeof(out[0]));
    tiles.store<3>(out[0] + 48, sizeof(out[0]));
  }

  template <int32_t columns>
  static void values(Tiles& tiles, HeadState& state, const Strip& strip, const Weights& weights, int32_t column) {
    alignas(64) int32_t high[kMaxGroup][64];
    alignas(64) int32_t low[kMaxGroup][64];
    multiply<columns>(tiles, state, strip, weights.high, column, high);
    prefetch_values(strip, column, columns, kLines, state.dim);
    multiply<columns>(tiles, state, strip, weights.low, column, low);
    const __m512 unit = _mm512_set1_ps(weights.unit);
    for (int32_t h = 0; h < state.group; ++h) {
      float* acc = state.acc + h * state.dim + column * kColumn;
      for (int32_t c = 0; c < columns * kColumn; c += 16) {
        const __m512 sum = joined(high[h] + c, low[h] + c);
        _mm512_storeu_ps(acc + c, _mm512_fmadd_ps(sum, unit, _mm512_loadu_ps(acc + c)));
      }
    }
  }
  static TileShapes key_shapes(const HeadState& state) { return shapes(state.group, state.dim % 64 / 4); }
  static TileShapes value_shapes(const HeadState& state) { return shapes(state.group, kLines); }
};

// ---- either

template <typename Kv>
void attend(HeadState& state, const Strip& strip) {
  alignas(64) float scores[kMaxGroup][64];
  typename Kv::Weights weights;
  weights.start(strip);
  Tiles tiles;
  tiles.configure(Kv::key_shapes(state));
  Kv::scores(tiles, state, strip, scores);
  for (int32_t h = 0; h < state.group; ++h) {
    Kv::weigh(state, strip, h, scores[h], weights);
  }
  tiles.configure(Kv::value_shapes(state));
  const int32_t columns = state.dim / kColumn;
  int32_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    Kv::template values<4>(tiles, state, strip, weights, column);
  }
  for (; column < columns; ++column) {
    Kv::template values<1>(tiles, state, strip, weights, column);
  }
  tiles.release();
}

}  // namespace

StripKernel amx_strip(DType kv, DType activation) {
  if (kv == DType::kBFloat16 && activation == DType::kBFloat16) {
    return {Bf16::prepare, attend<Bf16>};
  }
  if (kv == DType::kInt8) {
    return {Int8::prepare, attend<Int8>};
  }
  return {};
}

}  // namespace neo
