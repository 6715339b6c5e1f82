// A lying cpu_service: the engine's calls on a channel, one after the other as the input says, over control and step
// memory that somebody else writes to in between. No call may leave the memory, wait beyond its time-out, or fail in
// another way than by its status or std::invalid_argument.
#include "dataplane_channel.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>

namespace {

using namespace neo;

constexpr StepShape kShape{2, 4, 2, 32, 16, DType::kFloat32, 6, 4};
constexpr int64_t kBlocks = 24;
constexpr int64_t kMostUs = 50;
constexpr int64_t kSlackUs = 2'000'000;  // of CPU: on a busy machine the clock says nothing

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

std::span<std::byte> memory_of(std::size_t bytes) {
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kLine, bytes));
  std::memset(data, 0, bytes);
  return {data, bytes};
}

WaitStatus begin(StepChannel& channel, Input& input) {
  int32_t lengths[8];
  int32_t tables[32];
  LayerRange ranges[2];
  const auto rows = static_cast<int32_t>(input.take(1) % 8);
  for (int32_t& length : lengths) {
    length = static_cast<int8_t>(input.take(1));
  }
  for (int32_t& block : tables) {
    block = static_cast<int8_t>(input.take(1)) % 26;
  }
  for (LayerRange& range : ranges) {
    range = {static_cast<int8_t>(input.take(1)) % 8, static_cast<int8_t>(input.take(1)) % 8};
  }
  const uint32_t flags = input.take(1);
  const LaneRows lanes[2] = {{rows, lengths, tables, 4, (flags & 1) != 0 ? ranges : nullptr}, {1, lengths, tables, 4}};
  return channel.begin_sweep({lanes, 1 + (flags >> 1 & 1)}, kMostUs, (flags & 4) != 0);
}

void call(StepChannel& channel, Input& input) {
  static const std::vector<float> in(6 * 4 * 32);
  static std::vector<float> out(6 * 4 * 32);
  const auto lane = static_cast<int32_t>(input.take(1) % 4) - 1;
  const auto layer = static_cast<int32_t>(input.take(1) % 4) - 1;
  switch (input.take(1) % 5) {
    case 0:
      begin(channel, input);
      break;
    case 1:
      channel.submit(lane, layer, in.data(), in.data(), in.data());
      break;
    case 2:
      channel.wait(lane, layer, out.data(), kMostUs, input.take(1) % 3);
      break;
    case 3:
      channel.cancel_sweep(kMostUs);
      break;
    default:
      channel.rows(lane, layer, input.take(1) % 3);
      channel.error();
      channel.progress();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  Input input(data, size);
  const StepSizes sizes = step_sizes(kShape);
  static const std::span<std::byte> control = memory_of(sizes.control_bytes);
  static const std::span<std::byte> step = memory_of(sizes.step_bytes);
  const StepMemory memory(kShape, control, step);
  std::memset(control.data(), 0, control.size());
  const std::vector<uint8_t> nonce(kNonceBytes);
  format_control(memory, 1, input.take(1) % 2 != 0 ? 0xFFFFFFFEU : 1, nonce);
  const std::size_t words = control.size() / 4;
  const auto scribble = [&] {
    for (uint32_t left = input.take(1) % 8; left > 0; --left) {
      const std::size_t at = input.take(2) % words;
      const uint32_t wide = input.take(1);
      const uint32_t value = wide < 200 ? wide - 8 : input.take(4);
      __atomic_store_n(reinterpret_cast<uint32_t*>(control.data()) + at, value, __ATOMIC_RELAXED);
    }
  };
  try {
    check_control(memory, 1, nonce);
    StepChannel channel(memory, kBlocks, 0);
    for (int calls = 0; calls < 24 && input.left() > 0; ++calls) {
      scribble();
      const std::clock_t start = std::clock();
      try {
        call(channel, input);
      } catch (const std::invalid_argument&) {
      }
      if (static_cast<int64_t>(std::clock() - start) * 1'000'000 / CLOCKS_PER_SEC > kSlackUs) {
        std::fprintf(stderr, "a call took longer than its time-out\n");
        std::abort();
      }
    }
    channel.revoke();
    channel.abort();
    scribble();
    check_control(memory, 1, nonce);
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
