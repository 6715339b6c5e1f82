// Paged decode attention on the CPU: the interface, without intrinsics. docs/architecture.md draws where it is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "kv_pool.hpp"
#include "thread_pool.hpp"

namespace neo {

// One layer's decode attention for some sequences. Arrays are dense, row-major, in the model's activation type.
struct AttentionBatch {
  int32_t rows = 0;
  const int32_t* lengths = nullptr;       // [rows] tokens attended, the new one included; >= 1
  const int32_t* block_tables = nullptr;  // [rows, table_stride] block ids
  int32_t table_stride = 0;
  const void* q = nullptr;      // [rows, query_heads, head_dim]
  const void* k_new = nullptr;  // [rows, kv_heads, head_dim] appended at position length - 1; null: already there
  const void* v_new = nullptr;
  void* out = nullptr;   // [rows, query_heads, head_dim]
  float* lse = nullptr;  // [rows, query_heads] log-sum-exp of the scaled scores; null: not wanted
};

// What stays the same over a session.
struct AttentionParams {
  int32_t query_heads = 0;
  DType activation = DType::kFloat32;  // of q, k_new, v_new and out
  float scale = 1.0F;
  int32_t window = 0;  // tokens a query sees, itself included; 0: all
  float softcap = 0.0F;
};

// Checks every index that `batch` holds against `pool`; throws std::invalid_argument with a sentence.
void check_batch(const KvPool& pool, const AttentionParams& params, const AttentionBatch& batch);

// Appends k_new / v_new, then attends. The caller has checked the batch. Uses all threads of `threads`; the result does
// not depend on their number nor on who ran what. Blocks until done. One call at a time per ThreadPool.
void decode_attention(ThreadPool& threads, const KvPool& pool, int32_t layer, const AttentionParams& params,
                      const AttentionBatch& batch);

// One layer among several that are attended together.
struct AttentionJob {
  int32_t layer = 0;
  AttentionParams params;
  AttentionBatch batch;
};

inline constexpr std::size_t kMostJobs = 8;

// The same for up to kMostJobs layers, whose work is shared out as one: nobody waits between them for the last item of
// a layer. They come about in order. `done(i)` is called once for each, when all its results are stored, by the thread
// that stored the last of them.
void decode_attention(ThreadPool& threads, const KvPool& pool, std::span<const AttentionJob> jobs,
                      const std::function<void(std::size_t)>& done);

}  // namespace neo
