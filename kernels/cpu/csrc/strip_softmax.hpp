// Scores to weights, over a vector type `Vec` (vec_*.hpp). Included by one translation unit per instruction set; all of
// it is internal to each.
#pragma once

#include <limits>

#include "strip.hpp"

namespace neo {
namespace {

// cap * tanh(x / cap). Near 0 by Cephes' polynomial: 1 - 2 / (exp(2x) + 1) loses the small differences there.
template <typename Vec>
inline Vec cap_scores(Vec score, float softcap) {
  const Vec x = score * Vec::all(1.0F / softcap);
  const Vec square = x * x;
  Vec y = Vec::all(-5.70498872745e-3F);
  y = fma(y, square, Vec::all(2.06390887954e-2F));
  y = fma(y, square, Vec::all(-5.37397155531e-2F));
  y = fma(y, square, Vec::all(1.33314422036e-1F));
  y = fma(y, square, Vec::all(-3.33332819422e-1F));
  const Vec near = fma(y * square, x, x);
  const Vec far = Vec::all(1.0F) - Vec::all(2.0F) / (exp(x + x) + Vec::all(1.0F));
  return Vec::all(softcap) * where_less(square, Vec::all(0.625F * 0.625F), near, far);
}

inline void mask_scores(float* row, const Strip& strip) {
  for (int32_t t = 0; t < strip.begin; ++t) {
    row[t] = -std::numeric_limits<float>::infinity();
  }
  for (int32_t t = strip.end; t < strip.count * kTileTokens; ++t) {
    row[t] = -std::numeric_limits<float>::infinity();
  }
}

// Replaces one head's scores by weights exp(score - top), and rescales what was summed before if `top` rose.
template <typename Vec>
inline void weigh_head(HeadState& state, const Strip& strip, int32_t g, float* row) {
  constexpr int32_t kLanes = Vec::kLanes;
  const int32_t tokens = strip.count * kTileTokens;
  if (state.softcap > 0.0F) {
    for (int32_t t = 0; t < tokens; t += kLanes) {
      cap_scores(Vec::load(row + t), state.softcap).store(row + t);
    }
  }
  mask_scores(row, strip);
  Vec highest = Vec::load(row);
  for (int32_t t = kLanes; t < tokens; t += kLanes) {
    highest = max(highest, Vec::load(row + t));
  }
  if (any_greater(highest, Vec::all(state.top[g]))) {
    const float top = highest.largest();
    if (state.top[g] > kNoScore) {
      const Vec shrink = Vec::all(exp(Vec::all(state.top[g] - top)).first());
      (Vec::load(state.sum[g]) * shrink).store(state.sum[g]);
      float* acc = state.acc + g * state.dim;
      for (int32_t i = 0; i < state.dim; i += kLanes) {
        (Vec::load(acc + i) * shrink).store(acc + i);
      }
    }
    state.top[g] = top;
  }
  Vec sum = Vec::load(state.sum[g]);
  const Vec top = Vec::all(state.top[g]);
  for (int32_t t = 0; t < tokens; t += kLanes) {
    const Vec weight = exp(Vec::load(row + t) - top);
    sum = sum + weight;
    weight.store(row + t);
  }
  sum.store(state.sum[g]);
}

inline void prefetch_scales(const Strip& strip) {
  for (const Tile& tile : strip.next) {
    __builtin_prefetch(tile.k_scale, 0, 2);
    __builtin_prefetch(tile.v_scale, 0, 2);
  }
}

// The tokens' V scales; exactly 0 outside of [begin, end), whatever is stored there.
inline void load_v_scales(const Strip& strip, float* scales) {
  prefetch_scales(strip);
  for (int32_t t = 0; t < kStripTokens; ++t) {
    scales[t] = t >= strip.begin && t < strip.end ? strip.tiles[t / 16].v_scale[t % 16] : 0.0F;
  }
}

}  // namespace
}  // namespace neo
