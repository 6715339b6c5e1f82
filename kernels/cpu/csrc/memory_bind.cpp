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
  threads.run(static_cast<int32_t>(chunks), [&](int32_t i) {
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

}  // namespace
}  // namespace neo

void bind_memory(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("want_huge_pages", &neo::want_huge_pages);
  m.def("touch", &neo::touch, release());
  m.def("read_all", &neo::read_all, release());
}
