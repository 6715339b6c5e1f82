// The host KV pool's memory layout: block-paged, layer-major.
//
//   pool = [layers][blocks] of one *piece* = the K and V of `block_tokens` tokens of one layer, all heads, contiguous
//          what is inside: kv_piece.hpp
//   slot = block id * block_tokens + offset in the block: one token's place in every layer
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace neo {

// The same numbers as neo.v1.KvDtype.
enum class DType : int32_t { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt8 = 4 };

// Goes up whenever the bytes of a piece, or of the control memory, mean something else.
inline constexpr uint32_t kLayoutVersion = 2;

struct KvLayout {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 0;
  DType dtype = DType::kFloat32;

  std::size_t piece_bytes() const;  // one block of one layer, a multiple of 64
};

// A view: does not own the memory. Throws std::invalid_argument on a layout that is not supported or memory too small.
class KvPool {
 public:
  KvPool(KvLayout layout, int64_t blocks, std::span<std::byte> memory);

  const KvLayout& layout() const { return layout_; }
  int64_t blocks() const { return blocks_; }
  std::byte* piece(int32_t layer, int64_t block) const {
    return base_ + (static_cast<std::size_t>(layer) * blocks_ + block) * piece_bytes_;
  }

 private:
  KvLayout layout_;
  int64_t blocks_;
  std::size_t piece_bytes_;
  std::byte* base_;
};

}  // namespace neo
