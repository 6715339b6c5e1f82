#include "thread_pool.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace neo {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kMaxItems = (1 << 24) - 4096;
constexpr std::size_t kLine = 64;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

void park(const std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word, int32_t count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// A region in one word, so that a ticket taken from it names the region it belongs to: region 16 | items 24 | next 24.
// `next` can run past `items` by one per thread, which is why it has bits to spare.
struct Ticket {
  explicit Ticket(uint64_t word) : region(word >> 48), items(word >> 24 & 0xFFFFFF), next(word & 0xFFFFFF) {}
  static uint64_t word(uint64_t region, uint64_t items) { return region << 48 | items << 24; }
  bool valid() const { return next < items; }
  uint64_t region;
  uint64_t items;
  uint64_t next;
};

struct FreeScratch {
  void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kLine}); }
};

}  // namespace

// A helper that has taken a valid ticket holds its region open, since `done` cannot reach `items` without it: so `body`
// and `error` need no lock against the next region, and a late or parked helper delays nobody.
struct ThreadPool::Impl {
  Impl(int32_t threads, std::span<const int32_t> cpus, int32_t spin)
      : spin_us(spin), reserve(2 * static_cast<uint64_t>(threads)) {
    for (int32_t i = 1; i < threads; ++i) {
      const int32_t cpu = cpus.empty() ? -1 : cpus[static_cast<std::size_t>(i - 1) % cpus.size()];
      helpers.emplace_back([this, cpu] { help(cpu); });
    }
  }

  ~Impl() {
    stop.store(true);
    bell.fetch_add(1);
    wake(bell, static_cast<int32_t>(helpers.size()));
    for (std::thread& helper : helpers) {
      helper.join();
    }
  }

  void help(int32_t cpu) {
    pthread_setname_np(pthread_self(), "neo-attend");
    if (cpu >= 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(static_cast<std::size_t>(cpu), &set);
      // A CPU that has since left the cpuset is no reason to stop: unpinned is slower, not wrong.
      pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    }
    while (!stop.load(std::memory_order_relaxed)) {
      take_items();
      wait_for_items();
    }
  }

  void wait_for_items() {
    const auto until = Clock::now() + std::chrono::microseconds(spin_us);
    while (true) {
      const uint32_t heard = bell.load(std::memory_order_acquire);
      if (Ticket(ticket.load(std::memory_order_acquire)).valid() || stop.load(std::memory_order_relaxed)) {
        return;
      }
      if (Clock::now() >= until) {
        parked.fetch_add(1);  // seq_cst, as in run(): either the caller sees this, or the bell has changed
        park(bell, heard);
        parked.fetch_sub(1);
        return;
      }
      for (int i = 0; i < 8; ++i) {
        relax();
      }
    }
  }

  Ticket take() {
    const Ticket seen(ticket.load(std::memory_order_acquire));
    return seen.valid() ? Ticket(ticket.fetch_add(1, std::memory_order_acq_rel)) : seen;
  }

  void take_items() {
    Ticket mine = take();
    while (mine.valid()) {
      const Ticket next = mine.next + reserve < mine.items ? take() : Ticket(0);
      run_item(mine, next);
      // Once this item counts as done its region may end, unless `next` holds it open.
      if (done.fetch_add(1) + 1 == mine.items && caller_parked.load()) {
        wake(done, 1);
      }
      mine = next.valid() ? next : take();
    }
  }

  void run_item(const Ticket& mine, const Ticket& next) {
    try {
      (*body)(static_cast<int32_t>(mine.next), next.valid() ? static_cast<int32_t>(next.next) : -1);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) {
        error = std::current_exception();
      }
    }
  }

  void wait_until_done(uint32_t items) {
    const auto until = Clock::now() + std::chrono::microseconds(std::max(spin_us, 1));
    while (true) {
      const uint32_t now = done.load(std::memory_order_acquire);
      if (now == items) {
        return;
      }
      if (Clock::now() >= until) {
        caller_parked.store(true);
        if (const uint32_t seen = done.load(); seen != items) {
          park(done, seen);
        }
        caller_parked.store(false);
        continue;
      }
      for (int i = 0; i < 8; ++i) {
        relax();
      }
    }
  }

  int32_t spin_us;
  // So many last items are not taken ahead: one that a slow thread holds would be waited for.
  uint64_t reserve;
  IsaChoice isa = chosen_isa();
  std::vector<std::thread> helpers;
  std::unique_ptr<std::byte[], FreeScratch> scratch;
  std::size_t scratch_bytes = 0;
  const std::function<void(int32_t, int32_t)>* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;
  alignas(kLine) std::atomic<uint64_t> ticket{0};
  alignas(kLine) std::atomic<uint32_t> done{0};
  std::atomic<bool> caller_parked{false};
  alignas(kLine) std::atomic<uint32_t> bell{0};
  std::atomic<int32_t> parked{0};
  std::atomic<bool> stop{false};
};

ThreadPool::ThreadPool(int32_t threads, std::span<const int32_t> cpus, int32_t spin_us) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be between 1 and 1024");
  }
  if (std::any_of(cpus.begin(), cpus.end(), [](int32_t cpu) { return cpu < 0 || cpu >= CPU_SETSIZE; })) {
    throw std::invalid_argument("cpus must be CPU numbers");
  }
  impl_ = std::make_unique<Impl>(threads, cpus, spin_us);
}

ThreadPool::~ThreadPool() = default;

int32_t ThreadPool::size() const { return static_cast<int32_t>(impl_->helpers.size()) + 1; }

IsaChoice ThreadPool::isa() const { return impl_->isa; }

void ThreadPool::run(int32_t items, const std::function<void(int32_t item, int32_t next)>& body, int32_t helpers) {
  if (items >= kMaxItems) {
    throw std::invalid_argument("too many items for one parallel region");
  }
  if (items <= 1 || helpers <= 0 || impl_->helpers.empty()) {
    for (int32_t item = 0; item < items; ++item) {
      body(item, item + 1 < items ? item + 1 : -1);
    }
    return;
  }
  Impl& pool = *impl_;
  pool.body = &body;
  pool.error = nullptr;
  pool.done.store(0, std::memory_order_relaxed);
  const uint64_t region = Ticket(pool.ticket.load(std::memory_order_relaxed)).region + 1;
  pool.ticket.store(Ticket::word(region, static_cast<uint64_t>(items)));
  pool.bell.fetch_add(1);
  if (const int32_t parked = pool.parked.load(); parked > 0) {
    wake(pool.bell, std::min({parked, helpers, items - 1}));
  }
  pool.take_items();
  pool.wait_until_done(static_cast<uint32_t>(items));
  if (pool.error) {
    std::rethrow_exception(std::exchange(pool.error, nullptr));
  }
}

std::byte* ThreadPool::scratch(std::size_t bytes) {
  if (bytes > impl_->scratch_bytes) {
    const std::size_t size = std::max(bytes, 2 * impl_->scratch_bytes);
    impl_->scratch.reset(new (std::align_val_t{kLine}) std::byte[size]);
    impl_->scratch_bytes = size;
  }
  return impl_->scratch.get();
}

}  // namespace neo
