// The cpu_service's end of the data plane: one thread per session that serves sweeps until it is stopped or revoked.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "attention.hpp"
#include "dataplane.hpp"
#include "thread_pool.hpp"

namespace neo {

struct WorkerConfig {
  KvLayout layout;
  int64_t blocks = 0;
  float scale = 1.0F;
  float softcap = 0.0F;
  std::vector<int32_t> windows;  // per layer, 0: none; empty: none anywhere
  int32_t threads = 1;           // the worker's own included
  std::vector<int32_t> cpus;     // where to pin them, the worker first; empty: not pinned
  int32_t spin_us = 50;          // how long the worker spins for a doorbell before it parks
};

// Upper bounds of the buckets that a layer's attention is counted in; one more bucket takes the rest.
inline constexpr std::array<int64_t, 12> kLayerBoundsUs = {50,   100,   200,   500,   1000,   2000,
                                                           5000, 10000, 20000, 50000, 100000, 1000000};

struct WorkerStats {
  uint64_t sweeps = 0;
  uint64_t rows = 0;  // rows times layers
  uint64_t kv_bytes_read = 0;
  uint64_t busy_ns = 0;
  uint64_t waits = 0;     // for a doorbell, in the middle of a sweep
  uint64_t wait_us = 0;   // what they took
  uint64_t parks = 0;     // futex waits, in sweeps or between them
  uint32_t backlog = 0;   // layers that have been rung for and are not done, now
  uint64_t layer_ns = 0;  // from when a layer was taken up until it was done, of all layers: they overlap
  std::array<uint64_t, kLayerBoundsUs.size() + 1> layers{};  // attended, by their time
};

// Trusts nothing that it reads from shared memory: a record is copied once, checked, and used from the copy, so that
// the engine cannot change it in between. A bad record stops the worker with the error word set; the process goes on.
class Worker {
 public:
  Worker(const StepMemory& memory, std::span<std::byte> pool, WorkerConfig config);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void start();
  // Returns once the thread has ended: from then on nothing of the session's memory is touched. Idempotent.
  void stop();
  WorkerStats stats() const;
  bool running() const { return running_.load(); }

 private:
  struct Lane {
    uint32_t sweep = 0;  // in work, or the next one
    bool loaded = false;
    int32_t layer = 0;
    int32_t stride = 0;
    std::vector<LayerRange> ranges;  // [layers]
    std::vector<int32_t> lengths;    // [rows]
    std::vector<int32_t> tables;     // [rows, stride]
  };
  enum class Turn { kNothing, kProgress, kFailed };

  void loop();
  void serve();
  Turn turn(int32_t lane);
  bool load(int32_t index);
  bool check(const Lane& lane, const std::vector<int32_t>& ids) const;
  void attend(int32_t index);
  AttentionJob job(int32_t index, int32_t layer) const;
  void finish(int32_t index, int32_t layer);
  void retire(int32_t index);
  bool has_work(int32_t index) const;
  bool stopping() const;
  bool must_not_park() const;
  void park();
  bool in_sweep() const;
  uint32_t backlog() const;
  void count(int64_t layer_ns);
  void fail(WorkerError error, uint32_t sweep);

  StepMemory memory_;
  WorkerConfig config_;
  KvPool pool_;
  AttentionParams params_;
  ThreadPool threads_;
  Lane lanes_[kLanes];
  std::thread thread_;
  std::mutex ending_;
  std::condition_variable has_ended_;
  bool ended_ = false;  // guarded by ending_
  std::atomic<bool> stop_{false};
  std::atomic<bool> running_{false};
  std::atomic<uint64_t> sweeps_{0};
  std::atomic<uint64_t> rows_{0};
  std::atomic<uint64_t> kv_bytes_{0};
  std::atomic<uint64_t> busy_ns_{0};
  std::atomic<uint64_t> waits_{0};
  std::atomic<uint64_t> wait_us_{0};
  std::atomic<uint64_t> parks_{0};
  std::atomic<uint64_t> layer_ns_{0};
  std::array<std::atomic<uint64_t>, kLayerBoundsUs.size() + 1> layers_{};
};

}  // namespace neo
