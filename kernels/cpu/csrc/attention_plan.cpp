#include "attention_plan.hpp"

#include <algorithm>

namespace neo {
namespace {

constexpr int32_t kAlign = 64;  // a strip: parts begin where strips do
// A row's parts are a quarter of it between these lengths: the fold of each shows in large batches (256 tokens: 1-2%),
// a row in few parts cannot be shared by many threads.
constexpr int32_t kLeastPart = 256;
constexpr int32_t kLongPart = 1024;
constexpr int32_t kPartsOfShort = 4;
constexpr int32_t kMostParts = 64;  // of one row: so long ones have longer parts still
constexpr int32_t kLongestChunk = 2048;
// So many, each head's counted, or threads wait for each other at the end of a small batch.
constexpr int32_t kChunksPerThread = 8;
// An item this large hides its start (some unprefetched lines) and the ticket; a smaller one balances better.
constexpr std::size_t kLeastItemBytes = 64 << 10;
constexpr std::size_t kMostItemBytes = 2 << 20;
constexpr int32_t kItemsPerThread = 16;
// A helper has to find this much to read, or waking it costs more than it saves.
constexpr std::size_t kBytesPerHelper = 128 << 10;

// How one row is cut.
struct Cut {
  Cut(int32_t length, int32_t window, int32_t chunk) : start(first_token(length, window) / kAlign * kAlign) {
    const auto share = [&](int32_t count) { return ((length - start - 1) / count / kAlign + 1) * kAlign; };
    part = std::max(std::clamp(share(kPartsOfShort), kLeastPart, kLongPart), share(kMostParts));
    parts = (length - start + part - 1) / part;
    const int32_t most = std::max(1, chunk / part);  // parts of a chunk, before the chunks are made alike
    const int32_t count = (parts + most - 1) / most;
    chunk_parts = (parts + count - 1) / count;
    chunks = (parts + chunk_parts - 1) / chunk_parts;
  }
  int32_t start;
  int32_t part;  // tokens
  int32_t parts;
  int32_t chunk_parts;
  int32_t chunks;
};

int64_t attended(const int32_t* lengths, int32_t rows, int32_t window) {
  int64_t tokens = 0;
  for (int32_t row = 0; row < rows; ++row) {
    tokens += lengths[row] - first_token(lengths[row], window);
  }
  return tokens;
}

// Tokens of a chunk, at most, where a call attends `tokens` of each KV head.
int32_t chunk_tokens(int64_t tokens, int32_t kv_heads, int32_t threads) {
  return static_cast<int32_t>(std::min<int64_t>(tokens * kv_heads / (threads * kChunksPerThread), kLongestChunk));
}

}  // namespace

PlanSize plan_size(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads) {
  const int32_t chunk = chunk_tokens(attended(lengths, rows, window), layout.kv_heads, threads);
  PlanSize size;
  for (int32_t row = 0; row < rows; ++row) {
    const Cut cut(lengths[row], window, chunk);
    size.chunks += cut.chunks;
    size.partials += cut.chunks > 1 ? cut.parts : 0;
  }
  return size;
}

AttentionPlan make_plan(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads,
                        ChunkPlan* chunks) {
  AttentionPlan plan{chunks, 0, 0, layout.kv_heads, 1, 0};
  const int64_t tokens = attended(lengths, rows, window);
  const int32_t chunk = chunk_tokens(tokens, layout.kv_heads, threads);
  for (int32_t row = 0; row < rows; ++row) {
    const Cut cut(lengths[row], window, chunk);
    const int32_t partial = cut.chunks > 1 ? plan.partials : -1;
    for (int32_t first = 0; first < cut.parts; first += cut.chunk_parts) {
      const int32_t begin = cut.start + first * cut.part;
      const int32_t end = std::min(lengths[row], begin + cut.chunk_parts * cut.part);
      chunks[plan.chunk_count++] = {row, begin, end, cut.part, partial, first, cut.parts, cut.chunks};
    }
    plan.partials += cut.chunks > 1 ? cut.parts : 0;
  }
  if (plan.chunk_count == 0) {
    return plan;
  }
  const std::size_t bytes =
      static_cast<std::size_t>(tokens) * layout.piece_bytes() / static_cast<std::size_t>(layout.block_tokens);
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
