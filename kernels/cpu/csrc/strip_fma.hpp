// The vector loop with fp32 multiply-adds, for any `Vec` and KV type. Included by one translation unit per instruction
// set; all of it is internal to each.
//
//   scores: for each packed row of K (16 tokens x w dims): widen to w vectors of 16 tokens, times q of each head
//   values: for each packed row of V (16 dims x w tokens): widen to w vectors of 16 dims, times each head's weight
#pragma once

#include "strip.hpp"
#include "strip_softmax.hpp"

namespace neo {
namespace {

// Vec::Wide<kv>::kPacked is w; Wide::get<j>(row, n) widens element j of lanes [n, n + kLanes) of a packed row.
template <typename Vec, DType kv>
struct FmaStrip {
  using Wide = typename Vec::template Wide<kv>;
  static constexpr int32_t kLanes = Vec::kLanes;
  static constexpr int32_t kMostHeads = 4;        // at once
  static constexpr int32_t kParts = 16 / kLanes;  // registers to a tile's width
  static constexpr int32_t kPacked = Wide::kPacked;
  static constexpr int32_t kRowBytes = 16 * kPacked * Wide::kBytes;

  static constexpr int32_t lines_of(int32_t bytes) { return bytes > 64 ? bytes / 64 : 1; }

  template <int32_t kHeads, int32_t kTiles>
  static void scores(const HeadState& state, const Strip& strip, Fetch& fetch, int32_t first, int32_t head,
                     float (*out)[64]) {
    Vec acc[kHeads][kTiles * kParts];
    for (auto& row : acc) {
      for (Vec& x : row) {
        x = Vec::all(0.0F);
      }
    }
    const float* q = state.q + head * state.dim;
    for (int32_t i = 0; i < state.dim / kPacked; ++i) {
      fetch.more<lines_of(kTiles * kRowBytes)>();
      for (int32_t t = 0; t < kTiles; ++t) {
        const std::byte* row = strip.tiles[first + t].k + i * kRowBytes;
        for (int32_t part = 0; part < kParts; ++part) {
          each_packed<kPacked>([&]<int32_t j>() {
            const Vec x = Wide::template get<j>(row, part * kLanes);
            for (int32_t h = 0; h < kHeads; ++h) {
              Vec& sum = acc[h][t * kParts + part];
              sum = fma(x, Vec::all(q[h * state.dim + i * kPacked + j]), sum);
            }
          });
        }
      }
    }
    for (int32_t h = 0; h < kHeads; ++h) {
      for (int32_t part = 0; part < kTiles * kParts; ++part) {
        const int32_t token = part * kLanes;
        Vec x = acc[h][part] * Vec::all(state.scale);
        if constexpr (kv == DType::kInt8) {
          x = x * Vec::load(strip.tiles[first + token / 16].k_scale + token % 16);
        }
        x.store(out[head + h] + first * 16 + token);
      }
    }
  }

  template <int32_t kHeads, int32_t kColumns>
  static void values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t column, int32_t head,
                     const float (*weights)[64]) {
    Vec acc[kHeads][kColumns * kParts];
    for (int32_t h = 0; h < kHeads; ++h) {
      for (int32_t c = 0; c < kColumns * kParts; ++c) {
        acc[h][c] = Vec::load(state.acc + (head + h) * state.dim + column * 16 + c * kLanes);
      }
    }
    for (int32_t i = 0; i < 16 / kPacked; ++i) {
      const int32_t offset = (i * (state.dim / 16) + column) * kRowBytes;
      for (int32_t t = 0; t < strip.count; ++t) {
        fetch.more<lines_of(kColumns * kRowBytes)>();
        const float* weight = weights[head] + t * 16 + i * kPacked;
        for (int32_t c = 0; c < kColumns; ++c) {
          const std::byte* row = strip.tiles[t].v + offset + c * kRowBytes;
          for (int32_t part = 0; part < kParts; ++part) {
            each_packed<kPacked>([&]<int32_t j>() {
              const Vec x = Wide::template get<j>(row, part * kLanes);
              for (int32_t h = 0; h < kHeads; ++h) {
                Vec& sum = acc[h][c * kParts + part];
                sum = fma(x, Vec::all(weight[h * 64 + j]), sum);
              }
            });
          }
        }
      }
    }
    for (int32_t h = 0; h < kHeads; ++h) {
      for (int32_t c = 0; c < kColumns * kParts; ++c) {
        acc[h][c].store(state.acc + (head + h) * state.dim + column * 16 + c * kLanes);
      }
    }
  }

  template <int32_t kHeads>
  static void all_values(HeadState& state, const Strip& strip, Fetch& fetch, int32_t head, const float (*weights)[64]) {
    const int32_t columns = state.dim / 16;
    int32_t column = 0;
    for (; column + Vec::kColumns <= columns; column += Vec::kColumns) {
      values<kHeads, Vec::kColumns>(state, strip, fetch, column, head, weights);
    }
    for (; column < columns; ++column) {
      values<kHeads, 1>(state, strip, fetch, column, head, weights);
    }
  }

  template <int32_t kHeads>
  static void heads(HeadState& state, const Strip& strip, Fetch& fetch, int32_t head, float (*scratch)[64],
                    const float* v_scales) {
    if (strip.count == 1) {
      scores<kHeads, 1>(state, strip, fetch, 0, head, scratch);
    } else {
      for (int32_t tile = 0; tile < strip.count; tile += Vec::kTiles) {
        scores<kHeads, Vec::kTiles>(state, strip, fetch, tile, head, scratch);
      }
    }
    for (int32_t h = head; h < head + kHeads; ++h) {
      weigh_head<Vec>(state, strip, h, scratch[h]);
      if constexpr (kv == DType::kInt8) {
        for (int32_t t = 0; t < kStripTokens; t += kLanes) {
          (Vec::load(scratch[h] + t) * Vec::load(v_scales + t)).store(scratch[h] + t);
        }
      }
    }
    all_values<kHeads>(state, strip, fetch, head, scratch);
  }

  static void attend(HeadState& state, const Strip& strip) {
    alignas(64) float scratch[kMaxGroup][64];
    alignas(64) float v_scales[64];
    if constexpr (kv == DType::kInt8) {
      load_v_scales(strip, v_scales);
    }
    Fetch fetch(strip, state.dim * kTileTokens * Wide::kBytes);
    for (int32_t head = 0; head < state.group; head += kMostHeads) {
      with_count<kMostHeads>(state.group - head,
                             [&]<int32_t kHeads>() { heads<kHeads>(state, strip, fetch, head, scratch, v_scales); });
    }
  }

  template <int32_t kCount, typename F>
  static void each_packed(F&& f) {
    f.template operator()<0>();
    if constexpr (kCount > 1) {
      f.template operator()<1>();
    }
    if constexpr (kCount > 2) {
      f.template operator()<2>();
      f.template operator()<3>();
    }
  }

  // Calls f<min(count, kMost)>.
  template <int32_t kMost, typename F>
  static void with_count(int32_t count, F&& f) {
    if constexpr (kMost == 1) {
      f.template operator()<1>();
    } else if (count >= kMost) {
      f.template operator()<kMost>();
    } else {
      with_count<kMost - 1>(count, f);
    }
  }
};

template <typename Vec>
StripKernel fma_strip(DType kv) {
  switch (kv) {
    case DType::kFloat32:
      return {nullptr, FmaStrip<Vec, DType::kFloat32>::attend};
    case DType::kBFloat16:
      return {nullptr, FmaStrip<Vec, DType::kBFloat16>::attend};
    case DType::kFloat16:
      return {nullptr, FmaStrip<Vec, DType::kFloat16>::attend};
    case DType::kInt8:
      return {nullptr, FmaStrip<Vec, DType::kInt8>::attend};
  }
  return {};
}

}  // namespace
}  // namespace neo
