#include "dataplane_channel.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace neo {

StepChannel::StepChannel(const StepMemory& memory, int64_t blocks, int32_t spin_us)
    : memory_(memory),
      blocks_(blocks),
      spin_us_(spin_us),
      sweep_(memory.header().first_sweep - 1),
      submitted_(static_cast<std::size_t>(kLanes) * memory.shape().layers, true) {
  for (std::vector<int32_t>& rows : layer_rows_) {
    rows.assign(submitted_.size(), 0);
  }
}

std::size_t StepChannel::index(int32_t lane, int32_t layer) const {
  return static_cast<std::size_t>(lane) * memory_.shape().layers + layer;
}

void StepChannel::check_lanes(std::span<const LaneRows> lanes) const {
  const StepShape& shape = memory_.shape();
  if (lanes.size() > kLanes) {
    throw std::invalid_argument("a sweep has at most two lanes");
  }
  int64_t rows = 0;
  for (const LaneRows& lane : lanes) {
    rows += lane.rows;
    for (int32_t layer = 0; lane.ranges != nullptr && layer < shape.layers; ++layer) {
      const LayerRange range = lane.ranges[layer];
      if (range.begin < 0 || range.begin > range.end || range.end > lane.rows) {
        throw std::invalid_argument("the rows of layer " + std::to_string(layer) + " are not rows of the lane");
      }
    }
    for (int32_t row = 0; row < lane.rows; ++row) {
      const int64_t used = (static_cast<int64_t>(lane.lengths[row]) + shape.block_tokens - 1) / shape.block_tokens;
      if (lane.lengths[row] < 1 || used > lane.table_stride || used > shape.max_blocks_per_row) {
        throw std::invalid_argument("length " + std::to_string(lane.lengths[row]) + " of row " + std::to_string(row) +
                                    " is not between 1 and what its block table holds");
      }
      const int32_t* table = lane.tables + static_cast<std::size_t>(row) * lane.table_stride;
      for (int64_t i = 0; i < used; ++i) {
        if (table[i] < 0 || table[i] >= blocks_) {
          throw std::invalid_argument("block id " + std::to_string(table[i]) + " of row " + std::to_string(row) +
                                      " is outside the host pool");
        }
      }
    }
  }
  if (rows > shape.max_rows) {
    throw std::invalid_argument("a sweep of " + std::to_string(rows) + " rows is larger than the session's " +
                                std::to_string(shape.max_rows));
  }
}

void StepChannel::write_record(std::span<const LaneRows> lanes, uint32_t flags) {
  const StepShape& shape = memory_.shape();
  RecordHeader& record = memory_.record(sweep_);
  record.sweep.store(sweep_, std::memory_order_relaxed);
  record.flags.store(flags, std::memory_order_relaxed);
  record.cancelled.store(0, std::memory_order_relaxed);
  int32_t* lengths = memory_.lengths(sweep_);
  int32_t* ids = memory_.block_ids(sweep_);
  for (int32_t index = 0; index < kLanes; ++index) {
    const LaneRows lane = index < static_cast<int32_t>(lanes.size()) ? lanes[index] : LaneRows{};
    record.rows[index].store(lane.rows, std::memory_order_relaxed);
    LayerRange* ranges = memory_.ranges(sweep_, index);
    if (lane.ranges == nullptr) {
      std::fill_n(ranges, shape.layers, LayerRange{0, lane.rows});
    } else {
      std::copy_n(lane.ranges, shape.layers, ranges);
    }
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      // A lane without rows retires at once; one with rows expects every layer, also those that none of them is in.
      const std::size_t at = this->index(index, layer);
      layer_rows_[sweep_ & 1U][at] = ranges[layer].end - ranges[layer].begin;
      submitted_[at] = (flags & kDeviceRings) != 0 || lane.rows == 0;
    }
    for (int32_t row = 0; row < lane.rows; ++row) {
      const int32_t used = (lane.lengths[row] + shape.block_tokens - 1) / shape.block_tokens;
      *lengths++ = lane.lengths[row];
      ids = std::copy_n(lane.tables + static_cast<std::size_t>(row) * lane.table_stride, used, ids);
    }
  }
}

// A doorbell of a lane without rows is not rung, and 2^31 sweeps later its old value would look like a future one.
void StepChannel::freshen_doorbells() {
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    for (int32_t layer = 0; layer < memory_.shape().layers; ++layer) {
      Doorbell& bell = memory_.doorbell(lane, layer);
      bell.submitted.store(sweep_ - 1, std::memory_order_relaxed);
      bell.done.store(sweep_ - 1, std::memory_order_relaxed);
    }
  }
}

bool StepChannel::all_submitted() const {
  return std::all_of(submitted_.begin(), submitted_.end(), [](bool done) { return done; });
}

WaitStatus StepChannel::begin_sweep(std::span<const LaneRows> lanes, int64_t timeout_us, bool device_rings) {
  check_lanes(lanes);
  if (!all_submitted()) {
    if (const WaitStatus status = cancel_sweep(timeout_us); status != WaitStatus::kOk) {
      return status;
    }
  }
  const uint32_t next = sweep_ + 1;
  const bool freshen = next % (1U << 28) == 0;
  // A device that rings has itself waited for a layer before it fills that layer's slot again: only the record must be
  // free. So sweeps can be published while the one before runs.
  const uint32_t left = freshen ? next - 1 : next - (device_rings ? kRingRecords : kSlots);
  if (const WaitStatus status = wait_retired(left, timeout_us); status != WaitStatus::kOk) {
    return status;
  }
  sweep_ = next;
  if (freshen) {
    freshen_doorbells();
  }
  write_record(lanes, device_rings ? kDeviceRings : 0);
  ControlHeader& header = memory_.header();
  header.published.store(sweep_, std::memory_order_release);
  ring_if_parked(header.worker_parked, header.worker_bell);
  return WaitStatus::kOk;
}

void StepChannel::check_call(int32_t lane, int32_t layer, uint32_t back) const {
  if (lane < 0 || lane >= kLanes || layer < 0 || layer >= memory_.shape().layers || back >= kSlots) {
    throw std::invalid_argument("there is no lane " + std::to_string(lane) + ", layer " + std::to_string(layer) +
                                ", sweep " + std::to_string(back) + " before this one");
  }
}

int32_t StepChannel::rows(int32_t lane, int32_t layer, uint32_t back) const {
  check_call(lane, layer, back);
  return layer_rows_[(sweep_ - back) & 1U][index(lane, layer)];
}

void StepChannel::submit(int32_t lane, int32_t layer, const void* q, const void* k, const void* v) {
  const StepShape& shape = memory_.shape();
  const auto rows = static_cast<std::size_t>(this->rows(lane, layer));
  if (submitted_[index(lane, layer)]) {
    throw std::invalid_argument("lane " + std::to_string(lane) + ", layer " + std::to_string(layer) +
                                " expects nothing in this sweep");
  }
  if (rows > 0) {
    std::memcpy(memory_.q(lane, layer, sweep_), q, rows * shape.query_row_bytes());
    std::memcpy(memory_.k(lane, layer, sweep_), k, rows * shape.kv_row_bytes());
    std::memcpy(memory_.v(lane, layer, sweep_), v, rows * shape.kv_row_bytes());
  }
  submitted_[index(lane, layer)] = true;
  memory_.doorbell(lane, layer).submitted.store(sweep_, std::memory_order_release);
  ring_if_parked(memory_.header().worker_parked, memory_.header().worker_bell);
}

WaitStatus StepChannel::wait(int32_t lane, int32_t layer, void* out, int64_t timeout_us, uint32_t back) {
  const auto rows = static_cast<std::size_t>(this->rows(lane, layer, back));
  if (rows == 0 || (back == 0 && !submitted_[index(lane, layer)])) {
    throw std::invalid_argument("nothing was submitted for lane " + std::to_string(lane) + ", layer " +
                                std::to_string(layer));
  }
  const uint32_t sweep = sweep_ - back;
  const std::atomic<uint32_t>& done = memory_.doorbell(lane, layer).done;
  const WaitStatus status =
      wait_until([&] { return reached(done.load(std::memory_order_acquire), sweep); }, timeout_us);
  if (status == WaitStatus::kOk) {
    std::memcpy(out, memory_.o(lane, layer, sweep), rows * memory_.shape().query_row_bytes());
  }
  return status;
}

WaitStatus StepChannel::cancel_sweep(int64_t timeout_us) {
  ControlHeader& header = memory_.header();
  memory_.record(sweep_).cancelled.store(1, std::memory_order_release);
  std::fill(submitted_.begin(), submitted_.end(), true);
  for (std::vector<int32_t>& rows : layer_rows_) {
    std::fill(rows.begin(), rows.end(), 0);
  }
  ring_if_parked(header.worker_parked, header.worker_bell);
  return wait_retired(sweep_, timeout_us);
}

WaitStatus StepChannel::wait_retired(uint32_t sweep, int64_t timeout_us) {
  return wait_until(
      [&] {
        const auto& retired = memory_.header().retired;
        return std::all_of(std::begin(retired), std::end(retired),
                           [&](const auto& lane) { return reached(lane.load(std::memory_order_acquire), sweep); });
      },
      timeout_us);
}

WaitStatus StepChannel::wait_until(const std::function<bool()>& ready, int64_t timeout_us) {
  ControlHeader& header = memory_.header();
  const int64_t start = now_us();
  const auto failed = [&] {
    return header.error.load(std::memory_order_relaxed) != 0 ||
           header.state.load(std::memory_order_relaxed) == static_cast<uint32_t>(WorkerState::kStopped);
  };
  for (int64_t now = start;; now = now_us()) {
    for (int spin = 0; spin < 32; ++spin) {
      if (aborted_.load(std::memory_order_relaxed)) {
        return WaitStatus::kAborted;
      }
      if (ready()) {
        return WaitStatus::kOk;
      }
      cpu_relax();
    }
    if (failed()) {
      return ready() ? WaitStatus::kOk : WaitStatus::kFailed;
    }
    if (now - start >= timeout_us) {
      return WaitStatus::kTimedOut;
    }
    if (now - start < spin_us_) {
      yield_cpu();
      continue;
    }
    const uint32_t observed = header.engine_bell.load(std::memory_order_acquire);
    header.engine_parked.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!ready() && !failed() && !aborted_.load(std::memory_order_relaxed)) {
      futex_wait(header.engine_bell, observed, std::max<int64_t>(timeout_us - (now - start), 1));
    }
    header.engine_parked.store(0, std::memory_order_relaxed);
  }
}

void StepChannel::revoke() {
  memory_.header().revoked.store(1, std::memory_order_release);
  ring_if_parked(memory_.header().worker_parked, memory_.header().worker_bell);
}

void StepChannel::abort() {
  aborted_.store(true);
  memory_.header().engine_bell.fetch_add(1);
  futex_wake(memory_.header().engine_bell, std::numeric_limits<int32_t>::max());
}

}  // namespace neo
