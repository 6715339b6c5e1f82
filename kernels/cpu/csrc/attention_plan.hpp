// Who reads what: lengths to work items. No pointers to tensors here.
//
// A row is cut into chunks of tokens by its own length alone, so that its result depends neither on the rest of the
// batch nor on the threads. Heads never mix, so how many of them make an item is free: enough items to balance, few
// enough to stay cheap.
//
//   row 0  |chunk 0      |chunk 1      |chunk 2 |     each chunk x each head range is an item; a row of more than one
//   row 1  |chunk 3 |                                 chunk ends in a merge, in chunk order, by whoever finishes last
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
  int32_t partial;  // of the row's first chunk in the list of partial results; -1: the row has one chunk
  int32_t index;    // of this chunk in its row
  int32_t count;    // of chunks in the row
};

struct AttentionPlan {
  ChunkPlan* chunks;
  int32_t chunk_count;
  int32_t partials;  // chunks of rows that have several
  int32_t heads_per_item;
  int32_t ranges;   // of heads
  int32_t helpers;  // threads worth waking beside the caller

  int32_t items() const { return chunk_count * ranges; }
};

inline int32_t first_token(int32_t length, int32_t window) {
  return window > 0 && length > window ? length - window : 0;
}

// Tokens of one chunk of a row that attends [start, length).
int32_t chunk_tokens(int32_t start, int32_t length);

// How many chunks all rows have together.
int32_t count_chunks(const int32_t* lengths, int32_t rows, int32_t window);

// Fills `chunks` [count_chunks()].
AttentionPlan make_plan(const KvLayout& layout, const int32_t* lengths, int32_t rows, int32_t window, int32_t threads,
                        ChunkPlan* chunks);

}  // namespace neo
