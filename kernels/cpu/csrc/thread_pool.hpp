// A pool of pinned threads that run one parallel region at a time. The calling thread takes part.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

namespace neo {

class ThreadPool {
 public:
  // `threads` >= 1, the caller included. `cpus`: where to pin the helpers (and not the caller), one after the other; empty:
  // not pinned. `spin_us`: how long an idle helper spins before it parks on a futex.
  explicit ThreadPool(int32_t threads, std::span<const int32_t> cpus = {}, int32_t spin_us = 50);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t size() const;

  // Calls body(i) for each i in [0, items), items taken dynamically; returns when all are done. The first exception of a
  // body is rethrown here. Not re-entrant.
  void run(int32_t items, const std::function<void(int32_t item)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace neo
