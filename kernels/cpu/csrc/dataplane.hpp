// What the engine core and a cpu_service share during a sweep: control and step memory of one session's epoch.
//
//   control = [header][doorbells: lanes x layers][descriptor ring: kRingRecords records]
//   step    = [lanes][layers][2 slots: sweep & 1] of q | k | v | o, each part 64-byte aligned
//
//   engine                                     worker (a thread of the cpu_service)
//   record[n] written, published = n   ----->  copies and checks record n
//   q, k, v of a layer, submitted = n  ----->  attention, o, fence
//                                      <-----  done = n
//   (all layers waited for)            <-----  retired = n
//
// Every counter is a sweep number, compared by signed difference, so that it may wrap. Whoever has nothing to do spins
// for a while and then parks on its bell; the other side rings a bell only when the parked flag is up, so that a hot
// exchange costs no system call. A GPU may write `submitted` itself, but cannot ring a bell: a record published with
// kDeviceRings keeps the worker from parking until that sweep is retired.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "kv_pool.hpp"

namespace neo {

inline constexpr uint64_t kControlMagic = 0x314C5254434F454EULL;  // "NEOCTRL1"
inline constexpr int32_t kLanes = 2;
inline constexpr uint32_t kRingRecords = 4;  // a power of two; two sweeps are in flight at most
inline constexpr uint32_t kSlots = 2;
inline constexpr std::size_t kNonceBytes = 16;
inline constexpr std::size_t kLine = 64;

// Fixed for one epoch; both sides compute all sizes and offsets from it.
struct StepShape {
  int32_t layers = 0;
  int32_t query_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 0;
  DType activation = DType::kFloat32;  // of q, k, v and o; never int8
  int32_t max_rows = 0;                // of one sweep over all lanes
  int32_t max_blocks_per_row = 0;

  // Throws std::invalid_argument naming the field that is out of range.
  void check() const;
  std::size_t query_row_bytes() const;
  std::size_t kv_row_bytes() const;
};

struct StepSizes {
  std::size_t record_bytes = 0;
  std::size_t ring_offset = 0;
  std::size_t control_bytes = 0;
  std::size_t q_bytes = 0;   // of one slot, rounded up to a line; o has the same
  std::size_t kv_bytes = 0;  // of k, and of v
  std::size_t slot_bytes = 0;
  std::size_t step_bytes = 0;
};
StepSizes step_sizes(const StepShape& shape);

enum class WorkerError : uint32_t { kNone = 0, kBadRecord = 1, kBadSequence = 2, kInternal = 3 };
enum class WorkerState : uint32_t { kIdle = 0, kRunning = 1, kStopped = 2 };

struct alignas(kLine) ControlHeader {
  // Written by the service before the engine maps it.
  uint64_t magic;
  uint32_t layout_version;
  uint32_t first_sweep;
  uint64_t epoch;
  uint64_t control_bytes;
  uint64_t step_bytes;
  uint8_t service_nonce[kNonceBytes];
  alignas(kLine) uint8_t engine_nonce[kNonceBytes];  // written by the engine, read back by the service
  // Written by the engine.
  alignas(kLine) std::atomic<uint32_t> published;
  std::atomic<uint32_t> revoked;  // 1: the engine has given this epoch up; the worker stops
  std::atomic<uint32_t> engine_parked;
  std::atomic<uint32_t> worker_bell;  // futex word of the worker
  // Written by the worker.
  alignas(kLine) std::atomic<uint32_t> state;
  std::atomic<uint32_t> error;  // WorkerError; the worker stops after setting it
  std::atomic<uint32_t> error_sweep;
  std::atomic<uint32_t> worker_parked;
  std::atomic<uint32_t> engine_bell;  // futex word of the engine
  std::atomic<uint32_t> retired[kLanes];
  std::atomic<uint32_t> progress;  // layers done: tells a slow worker from a dead one
};

// Two lines, so that the poller of one counter does not take the line that the other side writes.
struct Doorbell {
  alignas(kLine) std::atomic<uint32_t> submitted;
  alignas(kLine) std::atomic<uint32_t> done;
};

inline constexpr uint32_t kDeviceRings = 1;

struct LayerRange {
  int32_t begin = 0;
  int32_t end = 0;
};

// Followed by LayerRange [lanes][layers], int32 lengths [max_rows] (lane 0's rows, then lane 1's), and block ids, row
// after row, ceil(length / block_tokens) each. A layer's slot holds its rows from `begin` on.
struct alignas(kLine) RecordHeader {
  std::atomic<uint32_t> sweep;
  std::atomic<uint32_t> flags;
  std::atomic<uint32_t> cancelled;  // set later by the engine: no further layer of this sweep will be submitted
  std::atomic<int32_t> rows[kLanes];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free);

// Typed access to control and step memory. A view; checks the sizes of what it is given.
class StepMemory {
 public:
  StepMemory(const StepShape& shape, std::span<std::byte> control, std::span<std::byte> step);

  const StepShape& shape() const { return shape_; }
  const StepSizes& sizes() const { return sizes_; }
  ControlHeader& header() const { return *reinterpret_cast<ControlHeader*>(control_); }
  Doorbell& doorbell(int32_t lane, int32_t layer) const {
    return reinterpret_cast<Doorbell*>(control_ + sizeof(ControlHeader))[lane * shape_.layers + layer];
  }
  RecordHeader& record(uint32_t sweep) const { return *reinterpret_cast<RecordHeader*>(record_base(sweep)); }
  LayerRange* ranges(uint32_t sweep, int32_t lane) const {
    return reinterpret_cast<LayerRange*>(record_base(sweep) + sizeof(RecordHeader)) + lane * shape_.layers;
  }
  int32_t* lengths(uint32_t sweep) const { return reinterpret_cast<int32_t*>(ranges(sweep, kLanes)); }
  int32_t* block_ids(uint32_t sweep) const { return lengths(sweep) + shape_.max_rows; }

  std::byte* q(int32_t lane, int32_t layer, uint32_t sweep) const {
    const std::size_t index = (static_cast<std::size_t>(lane) * shape_.layers + layer) * kSlots + (sweep & 1U);
    return step_ + index * sizes_.slot_bytes;
  }
  std::byte* k(int32_t lane, int32_t layer, uint32_t sweep) const { return q(lane, layer, sweep) + sizes_.q_bytes; }
  std::byte* v(int32_t lane, int32_t layer, uint32_t sweep) const { return k(lane, layer, sweep) + sizes_.kv_bytes; }
  std::byte* o(int32_t lane, int32_t layer, uint32_t sweep) const { return v(lane, layer, sweep) + sizes_.kv_bytes; }

 private:
  std::byte* record_base(uint32_t sweep) const {
    return control_ + sizes_.ring_offset + (sweep % kRingRecords) * sizes_.record_bytes;
  }

  StepShape shape_;
  StepSizes sizes_;
  std::byte* control_;
  std::byte* step_;
};

// The service: writes header and doorbells of fresh, zeroed control memory.
void format_control(const StepMemory& memory, uint64_t epoch, uint32_t first_sweep, std::span<const uint8_t> nonce);
// The engine: throws std::invalid_argument when the memory is not what the service said it is.
void check_control(const StepMemory& memory, uint64_t epoch, std::span<const uint8_t> nonce);

// True when counter `value` has reached `sweep`.
inline bool reached(uint32_t value, uint32_t sweep) { return static_cast<int32_t>(value - sweep) >= 0; }

// Futex calls on shared memory. `wait` returns on a wake, a change, a signal or the time-out (negative: none).
void futex_wait(const std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_us);
void futex_wake(std::atomic<uint32_t>& word, int32_t waiters = 1);

// Rings `bell` if its owner has parked. The caller has already stored what the owner waits for.
void ring_if_parked(const std::atomic<uint32_t>& parked, std::atomic<uint32_t>& bell);

inline int64_t now_us() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Between two rounds of a spin: on a machine with fewer free cores than spinners the peer may be waiting for this very
// core, and without the yield each exchange took both sides' whole windows (420 us at 200, against 6).
inline void yield_cpu() { sched_yield(); }

inline constexpr int32_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

}  // namespace neo
