// Several sessions at once over the data plane, without Python, for builds with sanitizers (test_cpu_builds.py): each
// has an engine's thread, a thread that revokes and aborts as a keeper does, and a Worker with a pool of threads.
// Epochs end in the middle, by a deadline, by revocation, or because the worker is stopped; sweeps are cancelled, of
// one lane or two, fetched where they left or a sweep later, or rung by another thread as a device does. Spins of 0 let
// everybody park. Results are checked against one attention of the engine's own pool. Exits with the number that are
// wrong.
//
// Arguments: seconds, seed.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "dataplane_channel.hpp"
#include "worker.hpp"

namespace {

using namespace neo;

constexpr int32_t kLayers = 3;
constexpr int32_t kDim = 32;
constexpr int32_t kBlocks = 24;
constexpr int32_t kRows = 4;
constexpr int32_t kStride = 3;
constexpr int64_t kPatienceUs = 60'000'000;

std::atomic<int64_t> sweeps{0};
std::atomic<int32_t> wrong{0};

struct Aligned {
  explicit Aligned(std::size_t bytes)
      : size((bytes + 63) / 64 * 64), memory(new (std::align_val_t{64}) std::byte[size]) {
    std::memset(memory, 0, size);
  }
  ~Aligned() { ::operator delete[](memory, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  std::span<std::byte> span() const { return {memory, size}; }
  std::size_t size;
  std::byte* memory;
};

struct Rows {
  std::vector<int32_t> lengths;
  std::vector<int32_t> tables;
  std::vector<float> q, k, v;
  LaneRows lane() const {
    return {static_cast<int32_t>(lengths.size()), lengths.data(), tables.data(), kStride, nullptr};
  }
};

class Session {
 public:
  explicit Session(uint32_t seed)
      : random_(seed),
        shape_{kLayers, 2, 1, kDim, 16, DType::kFloat32, 2 * kRows, kStride},
        layout_{kLayers, 1, kDim, 16, DType::kFloat32},
        pool_(layout_.piece_bytes() * kLayers * kBlocks),
        mirror_(pool_.size),
        mirror_pool_(layout_, kBlocks, mirror_.span()),
        own_(1) {}

  void run(int64_t until) {
    for (uint64_t epoch = 1; now_us() < until; ++epoch) {
      // The tether has ended: the old worker is gone, so that the two pools may be made the same.
      std::memcpy(mirror_.memory, pool_.memory, pool_.size);
      this->epoch(epoch, until);
    }
  }

 private:
  int32_t pick(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(random_); }

  Rows rows(int32_t count, int32_t first_block) {
    Rows made;
    std::normal_distribution<float> normal;
    for (int32_t row = 0; row < count; ++row) {
      made.lengths.push_back(pick(1, 16 * kStride));
      for (int32_t i = 0; i < kStride; ++i) {
        made.tables.push_back(first_block + row * kStride + i);
      }
    }
    for (std::vector<float>* values : {&made.q, &made.k, &made.v}) {
      values->resize(static_cast<std::size_t>(count) * kDim * (values == &made.q ? 2 : 1));
      for (float& value : *values) {
        value = normal(random_);
      }
    }
    return made;
  }

  AttentionParams params() const { return {2, DType::kFloat32, 0.2F, 0, 0.0F}; }

  void check(const Rows& given, int32_t layer, const std::vector<float>& out) {
    std::vector<float> expected(given.q.size());
    const AttentionBatch batch{static_cast<int32_t>(given.lengths.size()),
                               given.lengths.data(),
                               given.tables.data(),
                               kStride,
                               given.q.data(),
                               given.k.data(),
                               given.v.data(),
                               expected.data(),
                               nullptr};
    decode_attention(own_, mirror_pool_, layer, params(), batch);
    wrong += std::memcmp(expected.data(), out.data(), out.size() * sizeof(float)) == 0 ? 0 : 1;
  }

  void epoch(uint64_t number, int64_t until) {
    const StepSizes sizes = step_sizes(shape_);
    const Aligned control(sizes.control_bytes);
    const Aligned step(sizes.step_bytes);
    const StepMemory memory(shape_, control.span(), step.span());
    const std::array<uint8_t, kNonceBytes> nonce{static_cast<uint8_t>(number)};
    // Close to where counters wrap round, and to where doorbells are freshened.
    format_control(memory, number, pick(0, 1) ? 0xFFFFFFF0U : (1U << 28) - 8, nonce);
    check_control(memory, number, nonce);
    WorkerConfig config;
    config.layout = layout_;
    config.blocks = kBlocks;
    config.scale = 0.2F;
    config.threads = pick(1, 3);
    config.spin_us = pick(0, 1) * 50;
    Worker worker(memory, pool_.span(), config);
    StepChannel channel(memory, kBlocks, pick(0, 1) * 50);
    worker.start();
    const int32_t ending = pick(0, 3);
    const int32_t after_us = pick(0, 20000);
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(after_us));
      if (ending == 0) {
        channel.revoke();
        channel.abort();
      } else if (ending == 1) {
        worker.stop();
      }
      (void)worker.stats();
      (void)worker.running();
    });
    const int64_t patience = ending == 2 ? pick(0, 300) : kPatienceUs;
    const int32_t most = ending == 3 ? pick(1, 40) : 1 << 30;
    for (int32_t i = 0; i < most && now_us() < until; ++i) {
      if (!sweep(channel, memory, patience)) {
        break;
      }
      ++sweeps;
    }
    other.join();
    channel.revoke();
    worker.stop();
  }

  bool sweep(StepChannel& channel, const StepMemory& memory, int64_t patience) {
    switch (pick(0, 3)) {
      case 0:
        return inline_sweep(channel, patience, 1);
      case 1:
        return inline_sweep(channel, patience, 2);
      case 2:
        return deferred_sweeps(channel, patience);
      default:
        return device_sweep(channel, memory, patience);
    }
  }

  bool inline_sweep(StepChannel& channel, int64_t patience, int32_t lanes) {
    const Rows given[] = {rows(pick(1, kRows), 0), rows(pick(1, kRows), kRows * kStride)};
    const LaneRows both[] = {given[0].lane(), given[1].lane()};
    if (channel.begin_sweep(std::span(both, lanes), patience) != WaitStatus::kOk) {
      return false;
    }
    const bool ends_early = pick(0, 9) == 0;
    for (int32_t layer = 0; layer < (ends_early ? pick(0, kLayers - 1) : kLayers); ++layer) {
      for (int32_t lane = 0; lane < lanes; ++lane) {
        channel.submit(lane, layer, given[lane].q.data(), given[lane].k.data(), given[lane].v.data());
      }
      for (int32_t lane = 0; lane < lanes; ++lane) {
        if (!fetch(channel, lane, layer, given[lane], patience, 0)) {
          return false;
        }
      }
    }
    return !ends_early || pick(0, 1) == 0 || channel.cancel_sweep(patience) == WaitStatus::kOk;
  }

  bool fetch(StepChannel& channel, int32_t lane, int32_t layer, const Rows& given, int64_t patience, uint32_t back) {
    std::vector<float> out(given.q.size());
    if (channel.wait(lane, layer, out.data(), patience, back) != WaitStatus::kOk) {
      return false;
    }
    check(given, layer, out);
    return true;
  }

  bool deferred_sweeps(StepChannel& channel, int64_t patience) {
    std::optional<Rows> before;
    for (int32_t i = 0; i < 4; ++i) {
      // Blocks of the sweep before are in use until its results are here.
      Rows given = rows(pick(1, kRows), i % 2 * kRows * kStride);
      const LaneRows lane = given.lane();
      if (channel.begin_sweep(std::span(&lane, 1), patience) != WaitStatus::kOk) {
        return false;
      }
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        if (before && !fetch(channel, 0, layer, *before, patience, 1)) {
          return false;
        }
        channel.submit(0, layer, given.q.data(), given.k.data(), given.v.data());
      }
      before = std::move(given);
    }
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      if (!fetch(channel, 0, layer, *before, patience, 0)) {
        return false;
      }
    }
    return true;
  }

  // As kernels/gpu/host_exchange.py: fills the slot, then a release; nobody is rung.
  bool device_sweep(StepChannel& channel, const StepMemory& memory, int64_t patience) {
    const Rows given = rows(pick(1, kRows), 0);
    const LaneRows lane = given.lane();
    // A slot's results are waited for before the slot is filled again; here, by the whole sweep.
    if (channel.begin_sweep(std::span(&lane, 1), patience, true) != WaitStatus::kOk) {
      return false;
    }
    const uint32_t sweep = channel.sweep();
    std::thread device([&] {
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        std::memcpy(memory.q(0, layer, sweep), given.q.data(), given.q.size() * sizeof(float));
        std::memcpy(memory.k(0, layer, sweep), given.k.data(), given.k.size() * sizeof(float));
        std::memcpy(memory.v(0, layer, sweep), given.v.data(), given.v.size() * sizeof(float));
        memory.doorbell(0, layer).submitted.store(sweep, std::memory_order_release);
      }
    });
    bool ok = true;
    for (int32_t layer = 0; ok && layer < kLayers; ++layer) {
      ok = fetch(channel, 0, layer, given, patience, 0);
    }
    device.join();
    return ok;
  }

  std::mt19937 random_;
  StepShape shape_;
  KvLayout layout_;
  Aligned pool_;
  Aligned mirror_;
  KvPool mirror_pool_;
  ThreadPool own_;
};

}  // namespace

int main(int count, char** arguments) {
  const int64_t seconds = count > 1 ? std::atoi(arguments[1]) : 5;
  const uint32_t seed = count > 2 ? static_cast<uint32_t>(std::atoi(arguments[2])) : 1;
  const int64_t until = now_us() + seconds * 1'000'000;
  std::vector<std::thread> engines;
  for (uint32_t i = 0; i < 3; ++i) {
    engines.emplace_back([=] { Session(seed * 100 + i).run(until); });
  }
  for (std::thread& engine : engines) {
    engine.join();
  }
  std::printf("%lld sweeps, %d wrong\n", static_cast<long long>(sweeps.load()), wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}
