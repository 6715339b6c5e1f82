// Python calls on plain memory: commit it, and read it as fast as it goes.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "thread_pool.hpp"

namespace py = pybind11;

namespace neo {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kChunk = 1 << 20;
constexpr std::size_t kAheadWords = 4096 / 8;

// Advice only: without huge pages it is slower, not wrong.
void want_huge_pages(std::uintptr_t address, std::size_t bytes) {
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (address + bytes) / kPage * kPage;
  if (end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
}

template <typename F>
void for_chunks(ThreadPool& threads, std::size_t bytes, F&& f) {
  const std::size_t chunks = (bytes + kChunk - 1) / kChunk;
  threads.run(static_cast<int32_t>(chunks), [&](int32_t i, int32_t) {
    const std::size_t begin = static_cast<std::size_t>(i) * kChunk;
    f(begin, std::min(bytes, begin + kChunk));
  });
}

// Writes each page without changing it, so that the system commits it, near the thread that touched it.
void touch(ThreadPool& threads, std::uintptr_t address, std::size_t bytes) {
  for_chunks(threads, bytes, [&](std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kPage) {
      reinterpret_cast<std::atomic<uint8_t>*>(address + at)->fetch_or(0, std::memory_order_relaxed);
    }
  });
}

// Adds up all words: what "reading" costs at least. The sum keeps the compiler from skipping it. Prefetches, as the
// attention does: without, a Sapphire Rapids host read 100 GB/s where the attention read 126.
uint64_t read_all(ThreadPool& threads, std::uintptr_t address, std::size_t bytes) {
  std::atomic<uint64_t> total{0};
  for_chunks(threads, bytes, [&](std::size_t begin, std::size_t end) {
    const auto* words = reinterpret_cast<const uint64_t*>(address);
    uint64_t sum = 0;
    std::size_t i = begin / 8;
    for (; i + 8 <= end / 8; i += 8) {
      __builtin_prefetch(words + i + kAheadWords, 0, 2);
      for (std::size_t j = 0; j < 8; ++j) {
        sum += words[i + j];
      }
    }
    for (; i < end / 8; ++i) {
      sum += words[i];
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

// The same over a pool as the attention reads it: one of the `regions` of each piece, those of four listed blocks side
// by side, K before V, and the next four blocks' prefetched meanwhile.
uint64_t read_regions(ThreadPool& threads, std::uintptr_t address, std::size_t region_bytes, int32_t regions,
                      std::uintptr_t blocks, int64_t count) {
  constexpr int64_t kBlocks = 64;
  constexpr int64_t kAbreast = 4;
  const auto* base = reinterpret_cast<const std::byte*>(address);
  const auto* ids = reinterpret_cast<const int32_t*>(blocks);
  const std::size_t half_words = region_bytes / 16;
  std::atomic<uint64_t> total{0};
  const int64_t items = (count + kBlocks - 1) / kBlocks * regions;
  threads.run(static_cast<int32_t>(items), [&](int32_t item, int32_t) {
    const int64_t end = std::min(count, (item / regions + 1) * kBlocks);
    // Blocks beyond the end repeat the last.
    const auto half = [&](int64_t i, int64_t which) {
      const auto id = static_cast<std::size_t>(ids[std::min(i, end - 1)]);
      return reinterpret_cast<const uint64_t*>(base + (id * regions + item % regions) * region_bytes) +
             which * half_words;
    };
    uint64_t sum = 0;
    for (int64_t i = item / regions * kBlocks; i < end; i += kAbreast) {
      const uint64_t* words[2 * kAbreast];
      const uint64_t* next[2 * kAbreast];
      for (int64_t t = 0; t < 2 * kAbreast; ++t) {
        words[t] = half(i + t % kAbreast, t / kAbreast);
        next[t] = half(i + kAbreast + t % kAbreast, t / kAbreast);
      }
      for (std::size_t line = 0; line < half_words; line += 8) {
        for (int64_t t = 0; t < 2 * kAbreast; ++t) {
          __builtin_prefetch(next[t] + line, 0, 2);
          for (std::size_t j = 0; j < 8; ++j) {
            sum += words[t][line + j];
          }
        }
      }
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace
}  // namespace neo

void bind_memory(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("want_huge_pages", &neo::want_huge_pages);
  m.def("touch", &neo::touch, release());
  m.def("read_all", &neo::read_all, release());
  m.def("read_regions", &neo::read_regions, release());
}
