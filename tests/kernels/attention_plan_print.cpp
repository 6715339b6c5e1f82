// Prints how a call is cut, for test_cpu_plan.py: first `items ranges partials`, then `row begin end part parts` of
// each chunk. Arguments: KV heads, head dim, dtype, threads, window, lengths.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention_plan.hpp"

int main(int argc, char** argv) {
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  const neo::KvLayout layout{1, number(1), number(2), 16, static_cast<neo::DType>(number(3))};
  const int32_t threads = number(4);
  const int32_t window = number(5);
  std::vector<int32_t> lengths;
  for (int i = 6; i < argc; ++i) {
    lengths.push_back(number(i));
  }
  const auto rows = static_cast<int32_t>(lengths.size());
  const neo::PlanSize size = neo::plan_size(layout, lengths.data(), rows, window, threads);
  std::vector<neo::ChunkPlan> chunks(size.chunks);
  const neo::AttentionPlan plan = neo::make_plan(layout, lengths.data(), rows, window, threads, chunks.data());
  if (plan.chunk_count != size.chunks || plan.partials != size.partials) {
    std::puts("the room asked for is not what is used");
    return 1;
  }
  std::printf("%d %d %d\n", plan.items(), plan.ranges, plan.partials);
  for (const neo::ChunkPlan& chunk : chunks) {
    std::printf("%d %d %d %d %d\n", chunk.row, chunk.begin, chunk.end, chunk.part, chunk.parts);
  }
}
