#include "thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace neo {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// A region is announced by raising `region_`; helpers wait for it on the atomic itself, which parks on a futex after the
// spin. `busy_` counts helpers inside the region, so that the caller knows when `body_` is free again.
struct ThreadPool::Impl {
  Impl(int32_t threads, std::span<const int32_t> cpus, int32_t spin) : spin_us(spin) {
    for (int32_t i = 1; i < threads; ++i) {
      const int32_t cpu = cpus.empty() ? -1 : cpus[static_cast<std::size_t>(i - 1) % cpus.size()];
      helpers.emplace_back([this, cpu] { help(cpu); });
    }
  }

  ~Impl() {
    stop.store(true);
    region.fetch_add(1);
    region.notify_all();
    for (std::thread& helper : helpers) {
      helper.join();
    }
  }

  void help(int32_t cpu) {
    if (cpu >= 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpu, &set);
      pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    }
    uint32_t seen = 0;
    while (true) {
      wait_for_region(seen);
      seen = region.load(std::memory_order_acquire);
      if (stop.load()) {
        return;
      }
      take_items();
      if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        busy.notify_one();
      }
    }
  }

  void wait_for_region(uint32_t seen) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us);
    while (region.load(std::memory_order_acquire) == seen) {
      if (std::chrono::steady_clock::now() >= until) {
        region.wait(seen, std::memory_order_acquire);
        return;
      }
      for (int i = 0; i < 32; ++i) {
        relax();
      }
    }
  }

  void take_items() {
    for (int32_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) {
      try {
        (*body)(item);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) {
          error = std::current_exception();
        }
      }
    }
  }

  int32_t spin_us;
  std::vector<std::thread> helpers;
  alignas(64) std::atomic<uint32_t> region{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<int32_t> next{0};
  alignas(64) std::atomic<int32_t> busy{0};
  int32_t items = 0;
  const std::function<void(int32_t)>* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;
};

ThreadPool::ThreadPool(int32_t threads, std::span<const int32_t> cpus, int32_t spin_us) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be between 1 and 1024");
  }
  impl_ = std::make_unique<Impl>(threads, cpus, spin_us);
}

ThreadPool::~ThreadPool() = default;

int32_t ThreadPool::size() const { return static_cast<int32_t>(impl_->helpers.size()) + 1; }

void ThreadPool::run(int32_t items, const std::function<void(int32_t item)>& body) {
  if (items <= 1 || impl_->helpers.empty()) {
    for (int32_t item = 0; item < items; ++item) {
      body(item);
    }
    return;
  }
  Impl& pool = *impl_;
  pool.items = items;
  pool.body = &body;
  pool.error = nullptr;
  pool.next.store(0);
  pool.busy.store(static_cast<int32_t>(pool.helpers.size()));
  pool.region.fetch_add(1, std::memory_order_acq_rel);
  pool.region.notify_all();
  pool.take_items();
  for (int32_t left = pool.busy.load(std::memory_order_acquire); left != 0;
       left = pool.busy.load(std::memory_order_acquire)) {
    pool.busy.wait(left, std::memory_order_acquire);
  }
  if (pool.error) {
    std::rethrow_exception(pool.error);
  }
}

}  // namespace neo
