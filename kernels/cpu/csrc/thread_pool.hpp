// A pool of pinned threads that run one parallel region at a time. The calling thread takes part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "isa.hpp"

namespace neo {

class ThreadPool {
 public:
  // `threads` >= 1, the caller included. `cpus`: where to pin the helpers (and not the caller), one after the other;
  // empty: not pinned. `spin_us`: how long an idle helper spins before it parks on a futex.
  explicit ThreadPool(int32_t threads, std::span<const int32_t> cpus = {}, int32_t spin_us = 50);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t size() const;

  // What its regions' vector loops are compiled for: chosen_isa() when the pool was made.
  IsaChoice isa() const;

  // Calls body(i, next) for each i in [0, items), items below 16 million, taken dynamically; returns when all are done,
  // without waiting for helpers that found nothing to do. `next`: what the same thread will take after i, so that it
  // can be prefetched, or -1 if that is open. Wakes at most `helpers` that have parked. The first exception of a body
  // is rethrown here. Not re-entrant, one caller at a time.
  void run(int32_t items, const std::function<void(int32_t item, int32_t next)>& body, int32_t helpers = 1 << 20);

  // Memory for the region's partial results, aligned to 64 bytes, kept from call to call. Its content is undefined.
  std::byte* scratch(std::size_t bytes);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace neo
