#include "worker.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace neo {
namespace {

constexpr std::chrono::milliseconds kWakeAgain{20};

std::span<const int32_t> helper_cpus(const WorkerConfig& config) {
  return config.cpus.size() > 1 ? std::span(config.cpus).subspan(1) : std::span<const int32_t>{};
}

// Orders the stores of this thread, non-temporal ones too, before the doorbell that follows.
void fence_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
  std::atomic_thread_fence(std::memory_order_release);
}

}  // namespace

Worker::Worker(const StepMemory& memory, std::span<std::byte> pool, WorkerConfig config)
    : memory_(memory),
      config_(std::move(config)),
      pool_(config_.layout, config_.blocks, pool),
      threads_(config_.threads, helper_cpus(config_), config_.spin_us) {
  const StepShape& shape = memory_.shape();
  const KvLayout& layout = config_.layout;
  if (layout.layers != shape.layers || layout.kv_heads != shape.kv_heads || layout.head_dim != shape.head_dim ||
      layout.block_tokens != shape.block_tokens) {
    throw std::invalid_argument("the pool's layout and the step's shape differ");
  }
  if (!config_.windows.empty() && config_.windows.size() != static_cast<std::size_t>(shape.layers)) {
    throw std::invalid_argument("sliding_window must have one entry per layer, or none");
  }
  params_.query_heads = shape.query_heads;
  params_.activation = shape.activation;
  params_.scale = config_.scale;
  params_.softcap = config_.softcap;
  const uint32_t first = memory_.header().first_sweep;
  for (Lane& lane : lanes_) {
    lane.sweep = first;
  }
}

Worker::~Worker() { stop(); }

void Worker::start() {
  if (thread_.joinable()) {
    throw std::logic_error("a worker is started once");
  }
  running_.store(true);
  memory_.header().state.store(static_cast<uint32_t>(WorkerState::kRunning));
  thread_ = std::thread([this] { loop(); });
}

void Worker::stop() {
  if (!thread_.joinable()) {
    return;
  }
  stop_.store(true);
  ControlHeader& header = memory_.header();
  // The bell is the engine's, too. It can wait for it in the worker's stead, and set it back while the worker is about
  // to wait: so everybody is woken, and again until the thread has ended.
  for (std::unique_lock lock(ending_); !ended_;) {
    header.worker_bell.fetch_add(1);
    futex_wake(header.worker_bell, std::numeric_limits<int32_t>::max());
    has_ended_.wait_for(lock, kWakeAgain, [this] { return ended_; });
  }
  thread_.join();
}

WorkerStats Worker::stats() const {
  WorkerStats stats{sweeps_.load(), rows_.load(),    kv_bytes_.load(), busy_ns_.load(),
                    waits_.load(),  wait_us_.load(), parks_.load(),    backlog()};
  stats.layer_ns = layer_ns_.load();
  std::transform(layers_.begin(), layers_.end(), stats.layers.begin(), [](const auto& count) { return count.load(); });
  return stats;
}

// Layers of a sweep that was cancelled stay undone: what is retired is behind nobody. The counters are the engine's to
// write, too; whatever it does there, a layer has one of two slots.
uint32_t Worker::backlog() const {
  uint32_t behind = 0;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t retired = memory_.header().retired[lane].load(std::memory_order_relaxed);
    for (int32_t layer = 0; layer < memory_.shape().layers; ++layer) {
      const Doorbell& bell = memory_.doorbell(lane, layer);
      const uint32_t rung = bell.submitted.load(std::memory_order_relaxed);
      if (!reached(retired, rung)) {
        behind += std::min(rung - bell.done.load(std::memory_order_relaxed), kSlots);
      }
    }
  }
  return behind;
}

void Worker::count(int64_t layer_ns) {
  layer_ns_.fetch_add(layer_ns, std::memory_order_relaxed);
  const auto bucket = std::lower_bound(kLayerBoundsUs.begin(), kLayerBoundsUs.end(), layer_ns / 1000);
  layers_[bucket - kLayerBoundsUs.begin()].fetch_add(1, std::memory_order_relaxed);
}

void Worker::loop() {
  pthread_setname_np(pthread_self(), "neo-worker");
  if (!config_.cpus.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(config_.cpus.front(), &set);
    // A CPU that has since left the cpuset is no reason to stop: unpinned is slower, not wrong.
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  }
  try {
    serve();
  } catch (...) {
    fail(WorkerError::kInternal, lanes_[0].sweep);
  }
  ControlHeader& header = memory_.header();
  header.state.store(static_cast<uint32_t>(WorkerState::kStopped));
  running_.store(false);
  ring_if_parked(header.engine_parked, header.engine_bell);
  const std::lock_guard lock(ending_);
  ended_ = true;
  has_ended_.notify_all();
}

void Worker::serve() {
  int64_t last_progress = now_us();
  int64_t counted = last_progress;  // up to when waiting has been counted
  bool waiting = false;
  while (!stopping()) {
    bool progress = false;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const Turn result = turn(lane);
      if (result == Turn::kFailed) {
        return;
      }
      progress |= result == Turn::kProgress;
    }
    if (progress) {
      last_progress = counted = now_us();
      waiting = false;
      continue;
    }
    for (int spin = 0; spin < 32; ++spin) {
      cpu_relax();
    }
    yield_cpu();
    int64_t now = now_us();
    if (now - last_progress >= config_.spin_us && !must_not_park()) {
      park();
      last_progress = now = now_us();
    }
    if (in_sweep()) {
      wait_us_.fetch_add(now - counted, std::memory_order_relaxed);
      waits_.fetch_add(waiting ? 0 : 1, std::memory_order_relaxed);
      waiting = true;
    }
    counted = now;
  }
}

bool Worker::stopping() const {
  return stop_.load(std::memory_order_relaxed) || memory_.header().revoked.load(std::memory_order_relaxed) != 0;
}

bool Worker::has_work(int32_t index) const {
  const Lane& lane = lanes_[index];
  if (!lane.loaded) {
    return reached(memory_.header().published.load(std::memory_order_acquire), lane.sweep);
  }
  return lane.layer == memory_.shape().layers ||
         reached(memory_.doorbell(index, lane.layer).submitted.load(std::memory_order_acquire), lane.sweep) ||
         memory_.record(lane.sweep).cancelled.load(std::memory_order_acquire) != 0;
}

bool Worker::in_sweep() const {
  return std::any_of(std::begin(lanes_), std::end(lanes_), [](const Lane& lane) { return lane.loaded; });
}

bool Worker::must_not_park() const {
  return std::any_of(std::begin(lanes_), std::end(lanes_), [this](const Lane& lane) {
    return lane.loaded && (memory_.record(lane.sweep).flags.load(std::memory_order_relaxed) & kDeviceRings) != 0;
  });
}

void Worker::park() {
  ControlHeader& header = memory_.header();
  const uint32_t observed = header.worker_bell.load(std::memory_order_acquire);
  header.worker_parked.store(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!stopping() && !has_work(0) && !has_work(1)) {
    parks_.fetch_add(1, std::memory_order_relaxed);
    futex_wait(header.worker_bell, observed, -1);
  }
  header.worker_parked.store(0, std::memory_order_relaxed);
}

// At most one step of one lane, so that neither lane waits for the other's whole sweep.
Worker::Turn Worker::turn(int32_t index) {
  Lane& lane = lanes_[index];
  if (!has_work(index)) {
    return Turn::kNothing;
  }
  if (!lane.loaded) {
    const uint32_t ahead = memory_.header().published.load(std::memory_order_acquire) - lane.sweep;
    if (ahead >= kRingRecords || memory_.record(lane.sweep).sweep.load(std::memory_order_relaxed) != lane.sweep) {
      fail(WorkerError::kBadSequence, lane.sweep);
      return Turn::kFailed;
    }
    if (!load(index)) {
      fail(WorkerError::kBadRecord, lane.sweep);
      return Turn::kFailed;
    }
    return Turn::kProgress;
  }
  const bool rung = lane.layer < memory_.shape().layers &&
                    reached(memory_.doorbell(index, lane.layer).submitted.load(std::memory_order_acquire), lane.sweep);
  if (rung) {
    attend(index);
  } else {
    retire(index);  // every layer done, or cancelled
  }
  return Turn::kProgress;
}

// Copies the lane's part of the record to private memory and checks the copy.
bool Worker::load(int32_t index) {
  Lane& lane = lanes_[index];
  const StepShape& shape = memory_.shape();
  const RecordHeader& record = memory_.record(lane.sweep);
  const int32_t rows = record.rows[index].load(std::memory_order_relaxed);
  const int32_t before = index == 0 ? 0 : record.rows[0].load(std::memory_order_relaxed);
  if (rows < 0 || before < 0 || rows > shape.max_rows || before > shape.max_rows - rows) {
    return false;
  }
  const LayerRange* ranges = memory_.ranges(lane.sweep, index);
  lane.ranges.assign(ranges, ranges + shape.layers);
  const int32_t* lengths = memory_.lengths(lane.sweep);
  const auto used = [&](int32_t length) { return (length - 1) / shape.block_tokens + 1; };
  const int32_t longest = shape.max_blocks_per_row * shape.block_tokens;
  const auto valid = [&](int32_t length) { return length >= 1 && length <= longest; };
  int64_t skipped = 0;  // block ids of the lanes before
  for (int32_t row = 0; row < before; ++row) {
    // Read once: the engine could change it between the check and the use.
    const int32_t length = __atomic_load_n(lengths + row, __ATOMIC_RELAXED);
    if (!valid(length)) {
      return false;
    }
    skipped += used(length);
  }
  lane.lengths.assign(lengths + before, lengths + before + rows);
  lane.stride = 1;
  for (const int32_t length : lane.lengths) {
    if (!valid(length)) {
      return false;
    }
    lane.stride = std::max(lane.stride, used(length));
  }
  // Fits the record: at most max_rows rows of at most max_blocks_per_row ids each, as checked above.
  const int32_t* ids = memory_.block_ids(lane.sweep) + skipped;
  lane.tables.resize(static_cast<std::size_t>(rows) * lane.stride);
  for (int32_t row = 0; row < rows; ++row) {
    int32_t* table = lane.tables.data() + static_cast<std::size_t>(row) * lane.stride;
    const int32_t count = used(lane.lengths[row]);
    std::copy_n(ids, count, table);
    ids += count;
    if (std::any_of(table, table + count, [&](int32_t id) { return id < 0 || id >= config_.blocks; })) {
      return false;
    }
  }
  for (const LayerRange& range : lane.ranges) {
    if (range.begin < 0 || range.begin > range.end || range.end > rows) {
      return false;
    }
  }
  lane.layer = rows == 0 ? shape.layers : 0;
  lane.loaded = true;
  return true;
}

AttentionJob Worker::job(int32_t index, int32_t layer) const {
  const Lane& lane = lanes_[index];
  const LayerRange range = lane.ranges[layer];
  AttentionJob job{layer, params_, {}};
  job.params.window = config_.windows.empty() ? 0 : config_.windows[layer];
  AttentionBatch& batch = job.batch;
  batch.rows = range.end - range.begin;
  batch.lengths = lane.lengths.data() + range.begin;
  batch.block_tables = lane.tables.data() + static_cast<std::size_t>(range.begin) * lane.stride;
  batch.table_stride = lane.stride;
  batch.q = memory_.q(index, layer, lane.sweep);
  batch.k_new = memory_.k(index, layer, lane.sweep);
  batch.v_new = memory_.v(index, layer, lane.sweep);
  batch.out = memory_.o(index, layer, lane.sweep);
  return job;
}

// All layers that have been rung for, as one piece of work: with several of a few rows each, threads would else wait
// for each other at the end of every layer. Each is done on its own.
void Worker::attend(int32_t index) {
  using Clock = std::chrono::steady_clock;
  const auto nanoseconds = [start = Clock::now()] {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  };
  Lane& lane = lanes_[index];
  std::array<AttentionJob, kMostJobs> jobs;
  std::size_t count = 0;
  uint64_t tokens = 0;
  int32_t end = lane.layer;
  while (end < memory_.shape().layers && count < kMostJobs &&
         reached(memory_.doorbell(index, end).submitted.load(std::memory_order_acquire), lane.sweep)) {
    const int32_t layer = end++;
    const LayerRange range = lane.ranges[layer];
    if (range.end == range.begin) {
      finish(index, layer);
      continue;
    }
    jobs[count] = job(index, layer);
    const int32_t window = jobs[count++].params.window;
    for (int32_t row = range.begin; row < range.end; ++row) {
      tokens += window > 0 ? std::min(lane.lengths[row], window) : lane.lengths[row];
    }
    rows_.fetch_add(range.end - range.begin, std::memory_order_relaxed);
  }
  if (count > 0) {
    decode_attention(threads_, pool_, std::span(jobs.data(), count), [&](std::size_t done) {
      this->count(nanoseconds());
      finish(index, jobs[done].layer);
    });
    kv_bytes_.fetch_add(tokens * config_.layout.piece_bytes() / config_.layout.block_tokens, std::memory_order_relaxed);
    busy_ns_.fetch_add(nanoseconds(), std::memory_order_relaxed);
  }
  lane.layer = end;
}

// The layer's results are stored: says so. Called by any thread.
void Worker::finish(int32_t index, int32_t layer) {
  ControlHeader& header = memory_.header();
  fence_stores();
  memory_.doorbell(index, layer).done.store(lanes_[index].sweep, std::memory_order_release);
  header.progress.fetch_add(1, std::memory_order_relaxed);
  ring_if_parked(header.engine_parked, header.engine_bell);
}

void Worker::retire(int32_t index) {
  Lane& lane = lanes_[index];
  ControlHeader& header = memory_.header();
  header.retired[index].store(lane.sweep, std::memory_order_release);
  ++lane.sweep;
  lane.loaded = false;
  lane.layer = 0;
  if (index == kLanes - 1) {
    sweeps_.fetch_add(1, std::memory_order_relaxed);
  }
  ring_if_parked(header.engine_parked, header.engine_bell);
}

void Worker::fail(WorkerError error, uint32_t sweep) {
  ControlHeader& header = memory_.header();
  header.error_sweep.store(sweep);
  header.error.store(static_cast<uint32_t>(error));
  ring_if_parked(header.engine_parked, header.engine_bell);
}

}  // namespace neo
