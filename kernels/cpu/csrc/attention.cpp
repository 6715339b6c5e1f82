#include "attention.hpp"

#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_item.hpp"
#include "attention_plan.hpp"
#include "isa.hpp"
#include "kv_piece.hpp"

namespace neo {
namespace {

std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Scratch memory of one call, and where its parts begin.
struct Parts {
  Parts(const KvLayout& layout, const AttentionParams& params, const AttentionBatch& batch, int32_t threads) {
    const PlanSize size = plan_size(layout, batch.lengths, batch.rows, params.window, threads);
    arrivals = round_up(sizeof(ChunkPlan) * static_cast<std::size_t>(size.chunks));
    stats = arrivals + round_up(sizeof(int32_t) * static_cast<std::size_t>(size.partials) * layout.kv_heads);
    const std::size_t heads = static_cast<std::size_t>(size.partials) * params.query_heads;
    accs = stats + round_up(2 * sizeof(float) * heads);
    bytes = accs + round_up(heads * layout.head_dim * sizeof(float));
  }
  std::size_t arrivals;
  std::size_t stats;
  std::size_t accs;
  std::size_t bytes;
};

Call make_call(const ThreadPool& threads, const KvPool& pool, const AttentionJob& job, const Parts& parts,
               std::byte* scratch) {
  const KvLayout& layout = pool.layout();
  const int32_t group = job.params.query_heads / layout.kv_heads;
  Call call{pool,
            job.layer,
            job.params,
            job.batch,
            PieceShape(layout),
            best_loop(threads.isa(), layout.dtype, job.params.activation, group).kernel,
            make_plan(layout, job.batch.lengths, job.batch.rows, job.params.window, threads.size(),
                      reinterpret_cast<ChunkPlan*>(scratch)),
            reinterpret_cast<std::atomic<int32_t>*>(scratch + parts.arrivals),
            reinterpret_cast<float*>(scratch + parts.stats),
            reinterpret_cast<float*>(scratch + parts.accs)};
  for (int32_t i = 0; i < call.plan.partials * call.plan.ranges; ++i) {
    call.arrivals[i].store(0, std::memory_order_relaxed);
  }
  return call;
}

// The items of several calls, numbered through.
class Calls {
 public:
  Calls(ThreadPool& threads, const KvPool& pool, std::span<const AttentionJob> jobs) {
    std::vector<Parts> parts;
    std::size_t bytes = 0;
    for (const AttentionJob& job : jobs) {
      parts.emplace_back(pool.layout(), job.params, job.batch, threads.size());
      bytes += parts.back().bytes;
    }
    std::byte* scratch = threads.scratch(bytes);
    calls_.reserve(jobs.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      calls_.push_back(make_call(threads, pool, jobs[i], parts[i], scratch));
      scratch += parts[i].bytes;
      const AttentionPlan& plan = calls_[i].plan;
      remaining_[i].store(plan.items(), std::memory_order_relaxed);
      items_ += plan.items();
      helpers_ += plan.helpers;
    }
  }

  int32_t items() const { return items_; }
  int32_t helpers() const { return helpers_; }

  std::size_t call_of(int32_t& number) const {
    std::size_t call = 0;
    for (; number >= calls_[call].plan.items(); ++call) {
      number -= calls_[call].plan.items();
    }
    return call;
  }

  // Returns whether it was the last item of its call.
  bool run(std::size_t call, int32_t number, int32_t next) {
    std::optional<Work> following;
    if (next >= 0) {
      const std::size_t its_call = call_of(next);
      following.emplace(calls_[its_call], next);
    }
    run_item(Work(calls_[call], number), following);
    return remaining_[call].fetch_sub(1, std::memory_order_acq_rel) == 1;
  }

 private:
  std::vector<Call> calls_;
  std::array<std::atomic<int32_t>, kMostJobs> remaining_;
  int32_t items_ = 0;
  int32_t helpers_ = 0;
};

}  // namespace

void check_batch(const KvPool& pool, const AttentionParams& params, const AttentionBatch& batch) {
  const KvLayout& layout = pool.layout();
  const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
  if (params.query_heads < layout.kv_heads || params.query_heads % layout.kv_heads != 0 ||
      params.query_heads / layout.kv_heads > kMaxGroup) {
    fail("query_heads must be 1 to 16 times kv_heads");
  }
  if (params.activation < DType::kFloat32 || params.activation > DType::kFloat16) {
    fail("q, k, v and out must be float32, bfloat16 or float16");
  }
  if (!std::isfinite(params.scale) || !std::isfinite(params.softcap) || params.softcap < 0.0F) {
    fail("scale and softcap must be finite, and softcap not negative");
  }
  if (batch.rows < 0 || params.window < 0) {
    fail("rows and window must not be negative");
  }
  for (int32_t row = 0; row < batch.rows; ++row) {
    const int32_t length = batch.lengths[row];
    const int64_t used = (static_cast<int64_t>(length) + layout.block_tokens - 1) / layout.block_tokens;
    if (length < 1 || used > batch.table_stride) {
      fail("length " + std::to_string(length) + " of row " + std::to_string(row) +
           " is not between 1 and what its block table holds");
    }
    const int32_t* table = batch.block_tables + static_cast<std::size_t>(row) * batch.table_stride;
    for (int64_t i = 0; i < used; ++i) {
      if (table[i] < 0 || table[i] >= pool.blocks()) {
        fail("block id " + std::to_string(table[i]) + " of row " + std::to_string(row) + " is outside the pool");
      }
    }
  }
}

void decode_attention(ThreadPool& threads, const KvPool& pool, std::span<const AttentionJob> jobs,
                      const std::function<void(std::size_t)>& done) {
  if (jobs.size() > kMostJobs) {
    throw std::invalid_argument("too many layers to attend at once");
  }
  Calls calls(threads, pool, jobs);
  const auto run = [&](int32_t number, int32_t next) {
    const std::size_t call = calls.call_of(number);
    if (calls.run(call, number, next)) {
      done(call);
    }
  };
  threads.run(calls.items(), run, calls.helpers());
}

void decode_attention(ThreadPool& threads, const KvPool& pool, int32_t layer, const AttentionParams& params,
                      const AttentionBatch& batch) {
  const AttentionJob job{layer, params, batch};
  decode_attention(threads, pool, std::span(&job, 1), [](std::size_t) {});
}

}  // namespace neo
