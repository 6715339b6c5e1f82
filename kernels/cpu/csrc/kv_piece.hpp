// The inside of a piece, and how single tokens get into it and out of it.
//
//   piece  = [kv_heads] regions
//   region = K | V | K scales | V scales              (scales for int8 only: float [block_tokens] each)
//   K      = [block_tokens / 16] tiles of [head_dim / w][16 tokens][w dims]
//   V      = [block_tokens / w][head_dim][w tokens]
//   w      = 1 for fp32 and fp16, 2 for bf16, 4 for int8
//
// A vector register of K then holds 16 tokens, one of V 16 dims, so that neither dot product ends in a horizontal sum,
// and w is what the dot-product instructions add up (VDPBF16PS pairs, VPDPBUSD quads; also AMX's B tiles). One region
// is contiguous: 8 KiB for 128 dims in bf16. docs/perf-log.md has the measurements.
#pragma once

#include <algorithm>
#include <cmath>

#include "convert.hpp"
#include "kv_pool.hpp"
#include "strip.hpp"

namespace neo {

struct PieceShape {
  explicit PieceShape(const KvLayout& layout)
      : width(layout.dtype == DType::kFloat32 ? 4
              : layout.dtype == DType::kInt8  ? 1
                                              : 2),
        half_bytes(width * static_cast<std::size_t>(layout.block_tokens) * layout.head_dim),
        scale_bytes(layout.dtype == DType::kInt8 ? sizeof(float) * layout.block_tokens : 0),
        region_bytes(2 * (half_bytes + scale_bytes)) {}
  std::size_t width;       // of one element
  std::size_t half_bytes;  // K of one head
  std::size_t scale_bytes;
  std::size_t region_bytes;
};

template <typename Kv>
inline constexpr int32_t kPacked = sizeof(Kv) == 1                ? 4
                                   : std::is_same_v<Kv, BFloat16> ? 2
                                                                  : 1;

// Calls f with a value of the C++ type that stores `dtype`.
template <typename F>
decltype(auto) with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kInt8:
      break;
  }
  return f(int8_t{});
}

// One head of one token in a region: its elements are `stride` apart, in runs of `run`.
template <typename Kv>
struct TokenPlace {
  Kv* first;
  int32_t run;  // kPacked (in K) or 1 (in V)
  int32_t stride;
  float* scale;  // null unless int8

  // Calls f(element, dim) for each of head_dim dims.
  template <typename F>
  void each(int32_t head_dim, F&& f) const {
    if (run == 1) {
      for (int32_t i = 0; i < head_dim; ++i) {
        f(first[static_cast<std::ptrdiff_t>(i) * stride], i);
      }
      return;
    }
    Kv* at = first;
    for (int32_t i = 0; i < head_dim; i += kPacked<Kv>, at += stride) {
      for (int32_t j = 0; j < kPacked<Kv>; ++j) {
        f(at[j], i + j);
      }
    }
  }
};

template <typename Kv>
TokenPlace<Kv> place_of(std::byte* region, const KvLayout& layout, const PieceShape& shape, int half, int32_t offset) {
  constexpr int32_t w = kPacked<Kv>;
  Kv* base = reinterpret_cast<Kv*>(region + half * shape.half_bytes);
  float* scale = nullptr;
  if constexpr (std::is_same_v<Kv, int8_t>) {
    scale = reinterpret_cast<float*>(region + 2 * shape.half_bytes + half * shape.scale_bytes) + offset;
  }
  if (half == 0) {
    Kv* tile = base + static_cast<std::size_t>(offset / kTileTokens) * kTileTokens * layout.head_dim;
    return {tile + offset % kTileTokens * w, w, kTileTokens * w, scale};
  }
  return {base + static_cast<std::size_t>(offset / w) * layout.head_dim * w + offset % w, 1, w, scale};
}

// Int8: symmetric, scale = max |x| / 127. NaN and infinity have no place there: NaN makes the scale NaN, so that it
// shows.
template <typename Kv, typename T>
void store_token(const T* source, const TokenPlace<Kv>& place, int32_t head_dim) {
  if constexpr (std::is_same_v<Kv, int8_t>) {
    float largest = 0.0F;
    float poison = 0.0F;
    for (int32_t i = 0; i < head_dim; ++i) {
      const float x = to_float(source[i]);
      largest = std::max(largest, std::fabs(x));
      poison += x * 0.0F;
    }
    *place.scale = largest / 127.0F + poison;
    const bool usable = largest > 0.0F && poison == 0.0F;
    const float inverse = usable ? 127.0F / largest : 0.0F;
    place.each(head_dim, [&](int8_t& x, int32_t i) {
      x = usable ? static_cast<int8_t>(std::lrintf(to_float(source[i]) * inverse)) : int8_t{0};
    });
  } else {
    place.each(head_dim, [&](Kv& x, int32_t i) { x = from_float<Kv>(to_float(source[i])); });
  }
}

template <typename Kv, typename T>
void load_token(const TokenPlace<Kv>& place, T* target, int32_t head_dim) {
  place.each(head_dim, [&](const Kv& x, int32_t i) {
    if constexpr (std::is_same_v<Kv, int8_t>) {
      target[i] = from_float<T>(static_cast<float>(x) * *place.scale);
    } else {
      target[i] = from_float<T>(to_float(x));
    }
  });
}

}  // namespace neo
