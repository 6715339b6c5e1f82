// What a vector loop sees: one KV head, four tiles of 16 tokens, the query heads that share them. One file per
// instruction set implements it (strip_*.cpp); plan, tables and masks are attention.cpp's. Plain data only: these
// headers are compiled with different flags, and an inline function here could reach a machine that lacks them.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "kv_pool.hpp"

namespace neo {

inline constexpr int32_t kMaxGroup = 16;
inline constexpr int32_t kMaxDim = 256;
inline constexpr int32_t kTileTokens = 16;
inline constexpr int32_t kStripTiles = 4;
inline constexpr int32_t kStripTokens = 64;

// Where `top` starts. Below any real score, and finite: a score of -infinity then has weight 0, not NaN.
inline constexpr float kNoScore = -1e30F;

struct Tile {
  const std::byte* k;
  const std::byte* v;
  const float* k_scale;  // [16], null unless int8
  const float* v_scale;
};

struct Strip {
  Tile tiles[kStripTiles];  // those from `count` on repeat the last one
  Tile next[kStripTiles];   // what comes after, to prefetch; repeats `tiles` at the end
  int32_t count;
  int32_t begin;  // tokens [begin, end) of the strip are attended; V outside of it is finite
  int32_t end;
};

// The running softmax of one group. Arrays over dims are packed: head g starts at g * dim.
struct HeadState {
  int32_t group;
  int32_t dim;
  float scale;
  float softcap;
  alignas(64) float q[kMaxGroup * kMaxDim];
  alignas(64) float acc[kMaxGroup * kMaxDim];
  alignas(64) std::byte q_packed[kMaxGroup * kMaxDim * 2];  // the kernel's own form of q
  float q_scale[kMaxGroup];
  int32_t q_sum[kMaxGroup][2];
  float top[kMaxGroup];
  alignas(64) float sum[kMaxGroup][16];  // partial sums of weights, added up at the end only
};

// Prefetches what comes after a strip, a few lines at a time, so that memory stays busy while the strip is worked on. A
// line of each of eight runs in turn: memory gives more to several runs abreast than to one (docs/perf-log.md).
struct Fetch {
  static constexpr int32_t kRuns = 2 * kStripTiles;
  const std::byte* runs[kRuns];  // K of the tiles, then V
  int32_t at = 0;                // lines
  int32_t end;

  Fetch(const Strip& strip, int32_t tile_bytes) {
    // Of a single tile each run is a quarter.
    const bool single = strip.next[0].k == strip.next[1].k;
    const int32_t step = single ? tile_bytes / kStripTiles : 0;
    end = (single ? step : tile_bytes) / 64 * kRuns;
    for (int32_t t = 0; t < kStripTiles; ++t) {
      runs[t] = strip.next[t].k + t * step;
      runs[kStripTiles + t] = strip.next[t].v + t * step;
    }
  }
  // `at` has to be a multiple of `lines`, a power of two. `locality` as of __builtin_prefetch: 2 is the second-level
  // cache.
  template <int32_t lines, int32_t locality = 2>
  void more() {
    static_assert(kRuns % lines == 0);
    if (at < end) {
      assert(at % lines == 0);
      const std::byte* const* run = runs + at % kRuns;
      const std::ptrdiff_t offset = at / kRuns * 64;
      for (int32_t i = 0; i < lines; ++i) {
        __builtin_prefetch(run[i] + offset, 0, locality);
      }
      at += lines;
    }
  }
};

struct StripKernel {
  void (*prepare)(HeadState&) = nullptr;  // fills q_packed and so on from q; null: nothing to do
  void (*attend)(HeadState&, const Strip&) = nullptr;
  // Scales [count] floats into an array of the activation's type; count is a multiple of 16. Null: not faster here.
  void (*store)(const float* from, float scale, int32_t count, void* to) = nullptr;
  // acc = weight * acc + its_weight * other, [count] each, a multiple of 16. Null: not faster here.
  void (*fold)(float* acc, float weight, const float* other, float its_weight, int32_t count) = nullptr;
  void (*release)() = nullptr;  // undoes on this thread what `prepare` left there; null: nothing to do
};

// The best kernel of an instruction set for this pair of types; `attend` is null where a lesser set has it.
StripKernel scalar_strip(DType kv, DType activation);
StripKernel avx2_strip(DType kv, DType activation);
StripKernel avx512_strip(DType kv, DType activation);
StripKernel avx512bf16_strip(DType kv, DType activation);
StripKernel amx_strip(DType kv, DType activation);
StripKernel neon_strip(DType kv, DType activation);

}  // namespace neo
