#include "dataplane.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace neo {
namespace {

std::size_t round_up(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", not between " +
                                std::to_string(low) + " and " + std::to_string(high));
  }
}

}  // namespace

void StepShape::check() const {
  check_range("layers", layers, 1, 1024);
  check_range("query_heads", query_heads, 1, 1024);
  check_range("kv_heads", kv_heads, 1, query_heads);
  check_range("head_dim", head_dim, 1, 1024);
  check_range("block_tokens", block_tokens, 1, 1024);
  check_range("max_rows", max_rows, 1, 65536);
  check_range("max_blocks_per_row", max_blocks_per_row, 1, 1 << 20);
  check_range("activation", static_cast<int32_t>(activation), 1, 3);
}

std::size_t StepShape::query_row_bytes() const {
  return static_cast<std::size_t>(query_heads) * head_dim * element_bytes(activation);
}

std::size_t StepShape::kv_row_bytes() const {
  return static_cast<std::size_t>(kv_heads) * head_dim * element_bytes(activation);
}

StepSizes step_sizes(const StepShape& shape) {
  shape.check();
  StepSizes sizes;
  const auto rows = static_cast<std::size_t>(shape.max_rows);
  const auto layers = static_cast<std::size_t>(shape.layers);
  sizes.record_bytes = round_up(sizeof(RecordHeader) + kLanes * layers * sizeof(LayerRange) + rows * sizeof(int32_t) +
                                rows * shape.max_blocks_per_row * sizeof(int32_t));
  sizes.ring_offset = sizeof(ControlHeader) + kLanes * layers * sizeof(Doorbell);
  sizes.control_bytes = sizes.ring_offset + kRingRecords * sizes.record_bytes;
  sizes.q_bytes = round_up(rows * shape.query_row_bytes());
  sizes.kv_bytes = round_up(rows * shape.kv_row_bytes());
  sizes.slot_bytes = 2 * sizes.q_bytes + 2 * sizes.kv_bytes;
  sizes.step_bytes = kLanes * layers * kSlots * sizes.slot_bytes;
  return sizes;
}

StepMemory::StepMemory(const StepShape& shape, std::span<std::byte> control, std::span<std::byte> step)
    : shape_(shape), sizes_(step_sizes(shape)), control_(control.data()), step_(step.data()) {
  if (control.size() < sizes_.control_bytes || step.size() < sizes_.step_bytes) {
    throw std::invalid_argument("control or step memory is smaller than the session's shape needs");
  }
  if (reinterpret_cast<uintptr_t>(control_) % kLine != 0 || reinterpret_cast<uintptr_t>(step_) % kLine != 0) {
    throw std::invalid_argument("control and step memory must start at a multiple of 64 bytes");
  }
}

void format_control(const StepMemory& memory, uint64_t epoch, uint32_t first_sweep, std::span<const uint8_t> nonce) {
  if (nonce.size() != kNonceBytes) {
    throw std::invalid_argument("the nonce must be 16 bytes");
  }
  ControlHeader& header = memory.header();
  header.layout_version = kLayoutVersion;
  header.first_sweep = first_sweep;
  header.epoch = epoch;
  header.control_bytes = memory.sizes().control_bytes;
  header.step_bytes = memory.sizes().step_bytes;
  std::memcpy(header.service_nonce, nonce.data(), kNonceBytes);
  const uint32_t before = first_sweep - 1;
  header.published.store(before);
  for (auto& retired : header.retired) {
    retired.store(before);
  }
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    for (int32_t layer = 0; layer < memory.shape().layers; ++layer) {
      memory.doorbell(lane, layer).submitted.store(before);
      memory.doorbell(lane, layer).done.store(before);
    }
  }
  header.magic = kControlMagic;
}

void check_control(const StepMemory& memory, uint64_t epoch, std::span<const uint8_t> nonce) {
  const ControlHeader& header = memory.header();
  if (header.magic != kControlMagic || header.layout_version != kLayoutVersion) {
    throw std::invalid_argument("the control memory has another layout version than this build");
  }
  if (header.epoch != epoch || nonce.size() != kNonceBytes ||
      std::memcmp(header.service_nonce, nonce.data(), kNonceBytes) != 0) {
    throw std::invalid_argument("the control memory is not the one that the cpu_service announced");
  }
  if (header.control_bytes != memory.sizes().control_bytes || header.step_bytes != memory.sizes().step_bytes) {
    throw std::invalid_argument("the control memory was made for another session shape");
  }
}

void futex_wait(const std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_us) {
  timespec timeout{};
  timeout.tv_sec = timeout_us / 1000000;
  timeout.tv_nsec = timeout_us % 1000000 * 1000;
  // Not FUTEX_PRIVATE: the word is shared between processes.
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, timeout_us < 0 ? nullptr : &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int32_t waiters) {
  syscall(SYS_futex, &word, FUTEX_WAKE, waiters, nullptr, nullptr, 0);
}

void ring_if_parked(const std::atomic<uint32_t>& parked, std::atomic<uint32_t>& bell) {
  // Orders the caller's store before the load of `parked`; the owner has the mirror image (parked, fence, condition),
  // so at least one of the two sees the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (parked.load(std::memory_order_relaxed) != 0) {
    bell.fetch_add(1, std::memory_order_release);
    futex_wake(bell);
  }
}

}  // namespace neo
