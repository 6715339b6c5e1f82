// One item of work: a chunk of a row's tokens, and some of its heads. Internal to the kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "attention.hpp"
#include "attention_plan.hpp"
#include "kv_piece.hpp"
#include "strip.hpp"

namespace neo {

// One call: what its items share. Partial results live in the thread pool's scratch memory, see Parts:
// chunks | arrivals [rows' first partial, ranges] | top, sum [partials, query_heads] | acc [partials, query_heads,
// dim]
struct Call {
  const KvPool& pool;
  int32_t layer;
  const AttentionParams& params;
  const AttentionBatch& batch;
  PieceShape shape;
  StripKernel kernel;
  AttentionPlan plan;
  std::atomic<int32_t>* arrivals;
  float* stats;
  float* accs;

  int32_t group() const { return params.query_heads / pool.layout().kv_heads; }
  const int32_t* table(int32_t row) const {
    return batch.block_tables + static_cast<std::size_t>(row) * batch.table_stride;
  }
  std::byte* region(int32_t row, int32_t head, int32_t token) const {
    return pool.piece(layer, table(row)[token / pool.layout().block_tokens]) + head * shape.region_bytes;
  }
};

// A chunk of tokens and its heads [head, last).
struct Item {
  Item(const AttentionPlan& plan, int32_t number, int32_t kv_heads)
      : chunk(plan.chunks[number / plan.ranges]),
        range(number % plan.ranges),
        head(range * plan.heads_per_item),
        last(std::min(kv_heads, head + plan.heads_per_item)) {}
  const ChunkPlan& chunk;
  int32_t range;
  int32_t head;
  int32_t last;
};

// An item of one of the calls that run together.
struct Work {
  Work(const Call& its_call, int32_t number) : call(its_call), item(call.plan, number, call.pool.layout().kv_heads) {}
  const Call& call;
  Item item;
};

// Attends the item, prefetching the start of `next`; where it is the last of its row, merges the row's chunks.
void run_item(const Work& work, const std::optional<Work>& next);

}  // namespace neo
