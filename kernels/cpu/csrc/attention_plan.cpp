#include "attention_plan.hpp"

#include <algorithm>

namespace neo {
namespace {

constexpr int32_t kAlign = 64;         // a strip: chunks begin where strips do
constexpr int32_t kLeastChunk = 1024;  // 512 read 3% slower: the start and the merge of each chunk show
constexpr int32_t kMostChunks = 64;    // of one row
// An item this large hides its start (some unprefetched lines) and the ticket; a smaller one balances better.
constexpr std::size_t kLeastItemBytes = 64 << 10;
constexpr std::size_t kMostItemBytes = 2 << 20;
constexpr int32_t kItemsPerThread = 16;
// A helper has to find this much to read, or waking it costs more than it saves.
constexpr std::size_t kBytesPerHelper = 128 << 10;

int32_t aligned_start(int32_t length, int32_t window) { return first_token(length, window) / kAlign * kAlign; }

}  // namespace

int32_t chunk_tokens(int32_t start, int32_t length) {
  const int32_t share = (length - start + kMostChunks - 1) / kMostChunks;
  return std::max(kLeastChunk, (share + kAlign - 1) / kAlign * kAlign);
}

int32_t count_chunks(const int32_t* lengths, int32_t rows, int32_t window) {
  int32_t count = 0;
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t start = aligned_start(lengths[row], window);
    const int32_t size = chunk_tokens(start, lengths[row]);
    count += (lengths[row] - start + size - 1) / size;
  }
  return count;
}

AttentionPlan make_plan(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads,
                        ChunkPlan* chunks) {
  AttentionPlan plan{chunks, 0, 0, layout.kv_heads, 1, 0};
  std::size_t tokens = 0;
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t start = aligned_start(lengths[row], window);
    const int32_t size = chunk_tokens(start, lengths[row]);
    const int32_t count = (lengths[row] - start + size - 1) / size;
    for (int32_t i = 0; i < count; ++i) {
      chunks[plan.chunk_count++] = {
          row,  start + i * size, std::min(lengths[row], start + (i + 1) * size), count > 1 ? plan.partials : -1, i,
          count};
    }
    plan.partials += count > 1 ? count : 0;
    tokens += static_cast<std::size_t>(lengths[row] - start);
  }
  if (plan.chunk_count == 0) {
    return plan;
  }
  const std::size_t bytes = tokens * layout.piece_bytes() / static_cast<std::size_t>(layout.block_tokens);
  const std::size_t wanted =
      std::clamp(bytes / (static_cast<std::size_t>(threads) * kItemsPerThread), kLeastItemBytes, kMostItemBytes);
  const std::size_t per_chunk = bytes / static_cast<std::size_t>(plan.chunk_count);
  const auto split = static_cast<int32_t>(std::min<std::size_t>(per_chunk / wanted + 1, layout.kv_heads));
  plan.heads_per_item = (layout.kv_heads + split - 1) / split;
  plan.ranges = (layout.kv_heads + plan.heads_per_item - 1) / plan.heads_per_item;
  plan.helpers = static_cast<int32_t>(std::min<std::size_t>(bytes / kBytesPerHelper, 1 << 20));
  return plan;
}

}  // namespace neo
