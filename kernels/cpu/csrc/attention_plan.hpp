// Who reads what: lengths to work items. No pointers to tensors here.
//
// A row is cut into parts of tokens by its own length alone. Each part has a softmax of its own, and the row's result
// is what they fold into, in order: so it depends neither on the rest of the batch nor on the threads. A chunk is so
// many parts of a row as suits the call: long ones cost less, short ones balance a small batch. Heads never mix, so how
// many of them make an item is free too.
//
//   row 0  |part |part |part |part |part |     each chunk x each head range is an item; of a row in one chunk its item
//          |chunk 0          |chunk 1    |     folds the parts at once, of one in several whoever finishes last does
//   row 1  |part |part |
//          |chunk 2    |
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_pool.hpp"
#include "thread_pool.hpp"

namespace neo {

struct ChunkPlan {
  int32_t row;
  int32_t begin;  // tokens [begin, end), begin a multiple of 64
  int32_t end;
  int32_t part;     // tokens of each part but the row's last, a multiple of 64
  int32_t partial;  // of the row's first part in the list of partial results; -1: the row has one chunk
  int32_t index;    // of its first part in the row
  int32_t parts;    // of the row
  int32_t count;    // of chunks in the row
};

struct AttentionPlan {
  ChunkPlan* chunks;
  int32_t chunk_count;
  int32_t partials;  // parts of rows that have several chunks
  int32_t heads_per_item;
  int32_t ranges;   // of heads
  int32_t helpers;  // threads worth waking beside the caller

  int32_t items() const { return chunk_count * ranges; }
};

inline int32_t first_token(int32_t length, int32_t window) {
  return window > 0 && length > window ? length - window : 0;
}

// What make_plan() needs room for.
struct PlanSize {
  int32_t chunks = 0;
  int32_t partials = 0;
};
PlanSize plan_size(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads);

// Fills `chunks` [plan_size().chunks].
AttentionPlan make_plan(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads,
                        ChunkPlan* chunks);

}  // namespace neo
