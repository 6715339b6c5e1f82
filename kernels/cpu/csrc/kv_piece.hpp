// The inside of a piece: [K | V][kv_heads][block_tokens][head_dim], then for int8 the scales [K | V][kv_heads][block_tokens].
#pragma once

#include <algorithm>
#include <cmath>

#include "convert.hpp"
#include "kv_pool.hpp"

namespace neo {

struct PieceShape {
  explicit PieceShape(const KvLayout& layout) {
    const std::size_t width = layout.dtype == DType::kFloat32 ? 4 : layout.dtype == DType::kInt8 ? 1 : 2;
    head_elements = static_cast<std::size_t>(layout.block_tokens) * layout.head_dim;
    half_elements = head_elements * layout.kv_heads;
    half_scales = layout.dtype == DType::kInt8 ? static_cast<std::size_t>(layout.block_tokens) * layout.kv_heads : 0;
    scales_offset = 2 * half_elements * width;
    bytes = scales_offset + 2 * half_scales * sizeof(float);
  }
  std::size_t head_elements;  // of one head's K
  std::size_t half_elements;  // of all heads' K
  std::size_t half_scales;
  std::size_t scales_offset;
  std::size_t bytes;
};

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

// One head of one token into its place. Int8: symmetric, scale = max |x| / 127.
template <typename Kv, typename T>
void store_row(const T* source, Kv* row, float* scale, int32_t head_dim) {
  if constexpr (std::is_same_v<Kv, int8_t>) {
    float largest = 0.0F;
    for (int32_t i = 0; i < head_dim; ++i) {
      largest = std::max(largest, std::fabs(to_float(source[i])));
    }
    *scale = largest / 127.0F;
    const float inverse = largest > 0.0F ? 127.0F / largest : 0.0F;
    for (int32_t i = 0; i < head_dim; ++i) {
      row[i] = static_cast<int8_t>(std::lrintf(to_float(source[i]) * inverse));
    }
  } else {
    for (int32_t i = 0; i < head_dim; ++i) {
      row[i] = from_float<Kv>(to_float(source[i]));
    }
  }
}

template <typename Kv, typename T>
void load_row(const Kv* row, const float* scale, T* target, int32_t head_dim) {
  if constexpr (std::is_same_v<Kv, int8_t>) {
    for (int32_t i = 0; i < head_dim; ++i) {
      target[i] = from_float<T>(static_cast<float>(row[i]) * *scale);
    }
  } else {
    for (int32_t i = 0; i < head_dim; ++i) {
      target[i] = from_float<T>(to_float(row[i]));
    }
  }
}

// Element (half, head, offset) of a piece: half 0 is K, 1 is V.
template <typename Kv>
Kv* piece_row(std::byte* piece, const KvLayout& layout, const PieceShape& shape, int half, int32_t head,
              int32_t offset) {
  return reinterpret_cast<Kv*>(piece) + half * shape.half_elements + head * shape.head_elements +
         static_cast<std::size_t>(offset) * layout.head_dim;
}

inline float* piece_scale(std::byte* piece, const KvLayout& layout, const PieceShape& shape, int half, int32_t head,
                          int32_t offset) {
  return reinterpret_cast<float*>(piece + shape.scales_offset) + half * shape.half_scales +
         static_cast<std::size_t>(head) * layout.block_tokens + offset;
}

// Stores K and V [kv_heads, head_dim] of one token.
template <typename Kv, typename T>
void store_token(std::byte* piece, const KvLayout& layout, const PieceShape& shape, int32_t offset, const T* k,
                 const T* v) {
  for (int half = 0; half < 2; ++half) {
    const T* source = half == 0 ? k : v;
    for (int32_t head = 0; head < layout.kv_heads; ++head) {
      store_row(source + static_cast<std::size_t>(head) * layout.head_dim,
                piece_row<Kv>(piece, layout, shape, half, head, offset),
                piece_scale(piece, layout, shape, half, head, offset), layout.head_dim);
    }
  }
}

}  // namespace neo
