// Python calls of the attention kernel. Shapes, dtypes and contiguity were checked by kernels/cpu/__init__.py; what
// indexes memory is checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "attention.hpp"
#include "kv_piece.hpp"

namespace py = pybind11;

namespace neo {
namespace {

template <typename T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

KvLayout make_layout(int32_t layers, int32_t kv_heads, int32_t head_dim, int32_t block_tokens, int32_t dtype) {
  return {layers, kv_heads, head_dim, block_tokens, static_cast<DType>(dtype)};
}

void check_slots(const KvPool& pool, int32_t layer, const int64_t* slots, int64_t tokens) {
  if (layer < 0 || layer >= pool.layout().layers) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " does not exist");
  }
  const int64_t end = pool.blocks() * pool.layout().block_tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    if (slots[i] < 0 || slots[i] >= end) {
      throw std::invalid_argument("slot " + std::to_string(slots[i]) + " is outside the pool");
    }
  }
}

// Calls f(kv element, activation element) for each token, spread over threads in chunks.
template <typename F>
void for_tokens(ThreadPool* threads, const KvPool& pool, int32_t activation, int64_t tokens, F&& f) {
  constexpr int64_t kChunk = 64;
  const auto chunk = [&](int32_t index, int32_t) {
    with_type(static_cast<DType>(activation), [&]<typename T>(T) {
      if constexpr (!std::is_same_v<T, int8_t>) {
        with_type(pool.layout().dtype, [&]<typename Kv>(Kv) {
          for (int64_t i = index * kChunk; i < std::min(tokens, (index + 1) * kChunk); ++i) {
            f(Kv{}, T{}, i);
          }
        });
      }
    });
  };
  const auto chunks = static_cast<int32_t>((tokens + kChunk - 1) / kChunk);
  if (threads != nullptr) {
    threads->run(chunks, chunk);
    return;
  }
  for (int32_t index = 0; index < chunks; ++index) {
    chunk(index, -1);
  }
}

// Calls f(place, half, head) for each head's K (half 0) and V (half 1) of one slot.
template <typename Kv, typename F>
void each_place(const KvPool& pool, const PieceShape& shape, int32_t layer, int64_t slot, F&& f) {
  const KvLayout& layout = pool.layout();
  std::byte* piece = pool.piece(layer, slot / layout.block_tokens);
  const auto offset = static_cast<int32_t>(slot % layout.block_tokens);
  for (int32_t head = 0; head < layout.kv_heads; ++head) {
    for (int half = 0; half < 2; ++half) {
      f(place_of<Kv>(piece + head * shape.region_bytes, layout, shape, half, offset), half, head);
    }
  }
}

void write_kv(const KvPool& pool, int32_t layer, std::uintptr_t slots, int64_t tokens, std::uintptr_t k,
              std::uintptr_t v, int32_t activation, ThreadPool* threads) {
  const auto* ids = pointer<const int64_t>(slots);
  check_slots(pool, layer, ids, tokens);
  const KvLayout& layout = pool.layout();
  const PieceShape shape(layout);
  const int64_t width = static_cast<int64_t>(layout.kv_heads) * layout.head_dim;
  for_tokens(threads, pool, activation, tokens, [&]<typename Kv, typename T>(Kv, T, int64_t i) {
    each_place<Kv>(pool, shape, layer, ids[i], [&](const TokenPlace<Kv>& place, int half, int32_t head) {
      store_token<Kv>(pointer<const T>(half == 0 ? k : v) + i * width + head * layout.head_dim, place, layout.head_dim);
    });
  });
}

void read_kv(const KvPool& pool, int32_t layer, std::uintptr_t slots, int64_t tokens, std::uintptr_t k,
             std::uintptr_t v, int32_t activation, ThreadPool* threads) {
  const auto* ids = pointer<const int64_t>(slots);
  check_slots(pool, layer, ids, tokens);
  const KvLayout& layout = pool.layout();
  const PieceShape shape(layout);
  const int64_t width = static_cast<int64_t>(layout.kv_heads) * layout.head_dim;
  for_tokens(threads, pool, activation, tokens, [&]<typename Kv, typename T>(Kv, T, int64_t i) {
    each_place<Kv>(pool, shape, layer, ids[i], [&](const TokenPlace<Kv>& place, int half, int32_t head) {
      load_token<Kv>(place, pointer<T>(half == 0 ? k : v) + i * width + head * layout.head_dim, layout.head_dim);
    });
  });
}

void copy_blocks(const KvPool& target, const KvPool& source, std::uintptr_t source_ids, std::uintptr_t target_ids,
                 int64_t count, ThreadPool* threads) {
  const KvLayout& layout = target.layout();
  const auto* from = pointer<const int64_t>(source_ids);
  const auto* to = pointer<const int64_t>(target_ids);
  for (int64_t i = 0; i < count; ++i) {
    if (from[i] < 0 || from[i] >= source.blocks() || to[i] < 0 || to[i] >= target.blocks()) {
      throw std::invalid_argument("a block id is outside its pool");
    }
  }
  const std::size_t bytes = layout.piece_bytes();
  const auto layer_of = [&](int32_t layer, int32_t) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(target.piece(layer, to[i]), source.piece(layer, from[i]), bytes);
    }
  };
  if (threads != nullptr) {
    threads->run(layout.layers, layer_of);
    return;
  }
  for (int32_t layer = 0; layer < layout.layers; ++layer) {
    layer_of(layer, -1);
  }
}

void attend(ThreadPool& threads, const KvPool& pool, int32_t layer, int32_t rows, int32_t query_heads,
            int32_t activation, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t tables,
            int32_t stride, std::uintptr_t lengths, std::uintptr_t out, std::uintptr_t lse, float scale, int32_t window,
            float softcap) {
  if (layer < 0 || layer >= pool.layout().layers) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " does not exist");
  }
  const AttentionParams params{query_heads, static_cast<DType>(activation), scale, window, softcap};
  const AttentionBatch batch{rows,
                             pointer<const int32_t>(lengths),
                             pointer<const int32_t>(tables),
                             stride,
                             pointer<const void>(q),
                             pointer<const void>(k),
                             pointer<const void>(v),
                             pointer<void>(out),
                             pointer<float>(lse)};
  check_batch(pool, params, batch);
  decode_attention(threads, pool, layer, params, batch);
}

}  // namespace
}  // namespace neo

void bind_attention(py::module_& m) {
  using namespace neo;
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  m.def("isa", [] { return isa_name(chosen_isa().isa); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : available_isas()) {
      names.emplace_back(isa_name(isa));
    }
    return names;
  });
  m.def("loop_isa", [](int32_t kv, int32_t activation, int32_t group) {
    return isa_name(best_loop(chosen_isa(), static_cast<DType>(kv), static_cast<DType>(activation), group).isa);
  });
  m.def("piece_bytes", [](int32_t layers, int32_t kv_heads, int32_t head_dim, int32_t block_tokens, int32_t dtype) {
    return make_layout(layers, kv_heads, head_dim, block_tokens, dtype).piece_bytes();
  });
  py::class_<ThreadPool>(m, "ThreadPool")
      .def(py::init([](int32_t threads, const std::vector<int32_t>& cpus, int32_t spin_us) {
        return std::make_unique<ThreadPool>(threads, cpus, spin_us);
      }))
      .def("size", &ThreadPool::size);
  py::class_<KvPool>(m, "KvPool")
      .def(py::init([](int32_t layers, int32_t kv_heads, int32_t head_dim, int32_t block_tokens, int32_t dtype,
                       int64_t blocks, std::uintptr_t address, std::size_t bytes) {
        return KvPool(make_layout(layers, kv_heads, head_dim, block_tokens, dtype), blocks,
                      {pointer<std::byte>(address), bytes});
      }))
      .def("write", &write_kv, release())
      .def("read", &read_kv, release())
      .def("copy_blocks", &copy_blocks, release())
      .def(
          "attend",
          [](const KvPool& pool, ThreadPool& threads, int32_t layer, int32_t rows, int32_t query_heads,
             int32_t activation, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t tables,
             int32_t stride, std::uintptr_t lengths, std::uintptr_t out, std::uintptr_t lse, float scale,
             int32_t window, float softcap) {
            attend(threads, pool, layer, rows, query_heads, activation, q, k, v, tables, stride, lengths, out, lse,
                   scale, window, softcap);
          },
          release());
}
