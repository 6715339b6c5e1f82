// A lying engine: a correct sweep of one session, with words of the control memory replaced as the input says, before
// the worker looks or while it works. Whatever is written, the worker must stay within control, step and pool memory
// (AddressSanitizer sees to that), must stop when told to, and must serve the next epoch correctly.
#include "worker.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "dataplane_channel.hpp"

namespace {

using namespace neo;

constexpr StepShape kShape{2, 4, 2, 32, 16, DType::kFloat32, 6, 4};
constexpr int64_t kBlocks = 24;
constexpr int64_t kSecondUs = 1'000'000;

// Of the exact size, so that a step beyond its end is seen.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes), data_(static_cast<std::byte*>(std::aligned_alloc(kLine, bytes))) {
    std::memset(data_, 0, bytes);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::span<std::byte> span() { return {data_, bytes_}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

// Takes numbers off the input's front; 0 behind its end.
class Input {
 public:
  Input(const uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  uint32_t take(std::size_t bytes) {
    uint32_t value = 0;
    for (std::size_t i = 0; i < bytes && left_ > 0; ++i, --left_) {
      value |= static_cast<uint32_t>(*data_++) << (8 * i);
    }
    return value;
  }
  std::size_t left() const { return left_; }

 private:
  const uint8_t* data_;
  std::size_t left_;
};

WorkerConfig config() {
  WorkerConfig made;
  made.layout = {kShape.layers, kShape.kv_heads, kShape.head_dim, kShape.block_tokens, DType::kFloat32};
  made.blocks = kBlocks;
  made.scale = 0.25F;
  made.spin_us = 0;
  return made;
}

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

struct Rows {
  int32_t lengths[2];
  int32_t tables[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  LaneRows lane() const { return {2, lengths, tables, 4, nullptr}; }
};

void scribble(std::span<std::byte> control, Input& input, std::size_t most) {
  const std::size_t words = control.size() / 4;
  for (std::size_t i = 0; i < most && input.left() > 0; ++i) {
    const std::size_t at = input.take(2) % words;
    const uint32_t wide = input.take(1);
    const uint32_t value = wide < 200 ? wide - 8 : input.take(4);
    __atomic_store_n(reinterpret_cast<uint32_t*>(control.data()) + at, value, __ATOMIC_RELAXED);
  }
}

void submit_all(StepChannel& channel, int32_t from) {
  static const std::vector<float> zeros(2 * 4 * 32);
  for (int32_t layer = from; layer < kShape.layers; ++layer) {
    channel.submit(0, layer, zeros.data(), zeros.data(), zeros.data());
  }
}

void honest_epoch(const StepMemory& memory, std::span<std::byte> control, std::span<std::byte> pool) {
  std::memset(control.data(), 0, control.size());
  const std::vector<uint8_t> nonce(kNonceBytes);
  format_control(memory, 2, 1, nonce);
  Worker worker(memory, pool, config());
  worker.start();
  StepChannel channel(memory, kBlocks, 0);
  const Rows rows{{5, 40}};
  const LaneRows lane = rows.lane();
  require(channel.begin_sweep({&lane, 1}, 30 * kSecondUs) == WaitStatus::kOk, "an honest sweep cannot begin");
  submit_all(channel, 0);
  std::vector<float> out(2 * 4 * 32);
  require(channel.wait(0, 1, out.data(), 30 * kSecondUs) == WaitStatus::kOk, "an honest sweep is not served");
  worker.stop();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  Input input(data, size);
  const StepSizes sizes = step_sizes(kShape);
  static Memory control(sizes.control_bytes);
  static Memory step(sizes.step_bytes);
  static Memory pool(KvLayout{2, 2, 32, 16, DType::kFloat32}.piece_bytes() * kShape.layers * kBlocks);
  const StepMemory memory(kShape, control.span(), step.span());
  std::memset(control.span().data(), 0, control.span().size());
  const std::vector<uint8_t> nonce(kNonceBytes);
  const uint32_t mode = input.take(1);
  format_control(memory, 1, (mode & 4) != 0 ? 0xFFFFFFFFU : 1, nonce);
  {
    StepChannel channel(memory, kBlocks, 0);
    const Rows rows{{static_cast<int32_t>(1 + input.take(1) % 64), static_cast<int32_t>(1 + input.take(1) % 64)}};
    const LaneRows lane = rows.lane();
    channel.begin_sweep({&lane, 1}, 0, (mode & 8) != 0);
    Worker worker(memory, pool.span(), config());
    const bool before = (mode & 1) != 0;
    if (before) {
      scribble(control.span(), input, 12);
    }
    if ((mode & 8) == 0 && (mode & 2) != 0) {
      submit_all(channel, 0);
    }
    worker.start();
    scribble(control.span(), input, 24);
    if ((mode & 8) == 0 && (mode & 2) == 0) {
      submit_all(channel, 0);
    }
    std::vector<float> out(2 * 4 * 32);
    if ((mode & 8) == 0) {
      channel.wait(0, 1, out.data(), 200);
    }
    scribble(control.span(), input, 24);
    worker.stats();
    worker.stop();
  }
  if ((mode & 0xF0) == 0) {
    honest_epoch(memory, control.span(), pool.span());
  }
  return 0;
}
