// The engine's end of the data plane.
#pragma once

#include <atomic>
#include <functional>
#include <span>
#include <vector>

#include "dataplane.hpp"

namespace neo {

enum class WaitStatus : int32_t {
  kOk = 0,
  kTimedOut = 1,
  kFailed = 2,   // the worker has set the error word, or stopped
  kAborted = 3,  // abort() was called: the peer is gone
};

// Rows of one lane: lengths [rows], tables [rows, stride]; entries past ceil(length / block_tokens) are ignored.
// ranges [layers]: which of the rows take part in each layer; null means all of them in all layers.
struct LaneRows {
  int32_t rows = 0;
  const int32_t* lengths = nullptr;
  const int32_t* tables = nullptr;
  int32_t table_stride = 0;
  const LayerRange* ranges = nullptr;
};

// Not thread-safe, except abort(). Keeps no memory: the caller keeps the mappings until it is destroyed.
class StepChannel {
 public:
  // `blocks`: size of the host pool. `spin_us`: how long a wait spins before it parks.
  StepChannel(const StepMemory& memory, int64_t blocks, int32_t spin_us);

  // Publishes the rows of the next sweep, after the worker has left the slots that it uses again. An earlier sweep of
  // which layers were never submitted is cancelled first. Throws std::invalid_argument on rows that do not fit.
  // `device_rings`: a GPU fills the slots and writes `submitted`, so that the worker must not park during the sweep.
  WaitStatus begin_sweep(std::span<const LaneRows> lanes, int64_t timeout_us, bool device_rings = false);
  // Number of the last sweep begun.
  uint32_t sweep() const { return sweep_; }
  // Rows of the lane that take part in the layer, in the sweep `back` (0 or 1) before the last one begun.
  int32_t rows(int32_t lane, int32_t layer, uint32_t back = 0) const;

  // Copies one layer's q, k, v of its rows into its slot and rings.
  void submit(int32_t lane, int32_t layer, const void* q, const void* k, const void* v);
  // Result of the layer in the sweep `back` before the last one begun, 0 or 1.
  WaitStatus wait(int32_t lane, int32_t layer, void* out, int64_t timeout_us, uint32_t back = 0);

  // Ends the current sweep early; when it returns kOk the worker touches nothing of it any more.
  WaitStatus cancel_sweep(int64_t timeout_us);

  // Tells the worker to stop for good; waits for nothing.
  void revoke();
  // From any thread: makes the current and every later wait return kAborted at once.
  void abort();

  WorkerError error() const { return static_cast<WorkerError>(memory_.header().error.load()); }
  uint32_t progress() const { return memory_.header().progress.load(); }

 private:
  WaitStatus wait_until(const std::function<bool()>& ready, int64_t timeout_us);
  WaitStatus wait_retired(uint32_t sweep, int64_t timeout_us);
  void check_lanes(std::span<const LaneRows> lanes) const;
  void write_record(std::span<const LaneRows> lanes, uint32_t flags);
  void check_call(int32_t lane, int32_t layer, uint32_t back) const;
  std::size_t index(int32_t lane, int32_t layer) const;
  void freshen_doorbells();
  bool all_submitted() const;

  StepMemory memory_;
  int64_t blocks_;
  int32_t spin_us_;
  uint32_t sweep_;
  std::vector<bool> submitted_;              // [lanes * layers] of the current sweep
  std::vector<int32_t> layer_rows_[kSlots];  // [lanes * layers] of the current sweep and the one before, by sweep & 1
  std::atomic<bool> aborted_{false};
};

}  // namespace neo
