#include "kv_pool.hpp"

#include <stdexcept>
#include <string>

#include "kv_piece.hpp"

namespace neo {
namespace {

constexpr int64_t kMaxBlocks = 1LL << 31;

void check_layout(const KvLayout& layout) {
  const auto fail = [](const char* what) { throw std::invalid_argument(what); };
  if (layout.layers < 1 || layout.layers > 1024) {
    fail("layers must be between 1 and 1024");
  }
  if (layout.kv_heads < 1 || layout.kv_heads > 1024) {
    fail("kv_heads must be between 1 and 1024");
  }
  if (layout.head_dim < 16 || layout.head_dim > 256 || layout.head_dim % 16 != 0) {
    fail("head_dim must be a multiple of 16 between 16 and 256");
  }
  if (layout.block_tokens != 16 && layout.block_tokens != 32 && layout.block_tokens != 64) {
    fail("block_tokens must be 16, 32 or 64");
  }
  if (layout.dtype < DType::kFloat32 || layout.dtype > DType::kInt8) {
    fail("the KV dtype is not known");
  }
}

}  // namespace

std::size_t KvLayout::piece_bytes() const {
  return PieceShape(*this).region_bytes * static_cast<std::size_t>(kv_heads);
}

KvPool::KvPool(KvLayout layout, int64_t blocks, std::span<std::byte> memory)
    : layout_(layout), blocks_(blocks), piece_bytes_(0), base_(memory.data()) {
  check_layout(layout);
  piece_bytes_ = layout.piece_bytes();
  if (blocks < 1 || blocks >= kMaxBlocks) {
    throw std::invalid_argument("blocks must be at least 1 and less than 2^31");
  }
  const auto needed = static_cast<std::size_t>(layout.layers) * static_cast<std::size_t>(blocks) * piece_bytes_;
  if (memory.size() < needed) {
    throw std::invalid_argument("the pool needs " + std::to_string(needed) + " bytes, but the memory has " +
                                std::to_string(memory.size()));
  }
  if (reinterpret_cast<std::uintptr_t>(base_) % 64 != 0) {
    throw std::invalid_argument("the pool's memory must be aligned to 64 bytes");
  }
}

}  // namespace neo
