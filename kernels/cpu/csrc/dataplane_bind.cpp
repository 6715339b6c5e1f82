// Python face of the data plane; kernels/cpu/dataplane.py checks arguments and keeps the memory alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <tuple>

#include "dataplane.hpp"
#include "dataplane_channel.hpp"
#include "worker.hpp"

namespace py = pybind11;

namespace neo {
namespace {

using Memory = std::pair<uintptr_t, std::size_t>;                            // address, bytes
using Lane = std::tuple<int32_t, uintptr_t, uintptr_t, int32_t, uintptr_t>;  // rows, lengths, tables, stride, ranges

std::span<std::byte> span_of(const Memory& memory) {
  return {reinterpret_cast<std::byte*>(memory.first), memory.second};
}

template <typename T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

std::span<const uint8_t> bytes_of(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

void bind_shape(py::module_& m) {
  py::class_<StepShape>(m, "StepShape")
      .def(py::init([](int32_t layers, int32_t query_heads, int32_t kv_heads, int32_t head_dim, int32_t block_tokens,
                       int32_t activation, int32_t max_rows, int32_t max_blocks_per_row) {
             return StepShape{layers,   query_heads,       kv_heads,
                              head_dim, block_tokens,      static_cast<DType>(activation),
                              max_rows, max_blocks_per_row};
           }),
           py::arg("layers"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("block_tokens"),
           py::arg("activation"), py::arg("max_rows"), py::arg("max_blocks_per_row"));
  m.def("step_sizes", [](const StepShape& shape) {
    const StepSizes sizes = step_sizes(shape);
    return std::make_pair(sizes.control_bytes, sizes.step_bytes);
  });
  // Bytes, of lane 0: for a device that writes and reads step memory itself.
  m.def("step_offsets", [](const StepShape& shape) {
    const StepSizes sizes = step_sizes(shape);
    const std::size_t bells = sizeof(ControlHeader);
    return std::make_tuple(bells + offsetof(Doorbell, submitted), bells + offsetof(Doorbell, done), sizeof(Doorbell),
                           sizes.slot_bytes, sizes.q_bytes, sizes.kv_bytes, offsetof(ControlHeader, revoked));
  });
  m.def("format_control", [](const StepShape& shape, const Memory& control, const Memory& step, uint64_t epoch,
                             uint32_t first_sweep, const py::bytes& nonce) {
    format_control(StepMemory(shape, span_of(control), span_of(step)), epoch, first_sweep, bytes_of(nonce));
  });
  m.def("check_control",
        [](const StepShape& shape, const Memory& control, const Memory& step, uint64_t epoch, const py::bytes& nonce) {
          check_control(StepMemory(shape, span_of(control), span_of(step)), epoch, bytes_of(nonce));
        });
  m.def("write_engine_nonce",
        [](const StepShape& shape, const Memory& control, const Memory& step, const std::string& nonce) {
          if (nonce.size() != kNonceBytes) {
            throw std::invalid_argument("the nonce must be 16 bytes");
          }
          const StepMemory memory(shape, span_of(control), span_of(step));
          std::memcpy(memory.header().engine_nonce, nonce.data(), kNonceBytes);
        });
  m.def("read_engine_nonce", [](const StepShape& shape, const Memory& control, const Memory& step) {
    const StepMemory memory(shape, span_of(control), span_of(step));
    return py::bytes(reinterpret_cast<const char*>(memory.header().engine_nonce), kNonceBytes);
  });
}

void bind_channel(py::module_& m) {
  py::class_<StepChannel>(m, "StepChannel")
      .def(py::init(
          [](const StepShape& shape, const Memory& control, const Memory& step, int64_t blocks, int32_t spin_us) {
            return std::make_unique<StepChannel>(StepMemory(shape, span_of(control), span_of(step)), blocks, spin_us);
          }))
      .def("begin_sweep",
           [](StepChannel& self, const std::vector<Lane>& lanes, int64_t timeout_us, bool device_rings) {
             std::vector<LaneRows> rows;
             rows.reserve(lanes.size());
             for (const auto& [count, lengths, tables, stride, ranges] : lanes) {
               rows.push_back(
                   {count, pointer<int32_t>(lengths), pointer<int32_t>(tables), stride, pointer<LayerRange>(ranges)});
             }
             const py::gil_scoped_release release;
             return static_cast<int32_t>(self.begin_sweep(rows, timeout_us, device_rings));
           })
      .def("submit",
           [](StepChannel& self, int32_t lane, int32_t layer, uintptr_t q, uintptr_t k, uintptr_t v) {
             const py::gil_scoped_release release;
             self.submit(lane, layer, pointer<void>(q), pointer<void>(k), pointer<void>(v));
           })
      .def("wait",
           [](StepChannel& self, int32_t lane, int32_t layer, uintptr_t out, int64_t timeout_us, uint32_t back) {
             const py::gil_scoped_release release;
             return static_cast<int32_t>(self.wait(lane, layer, reinterpret_cast<void*>(out), timeout_us, back));
           })
      .def("cancel_sweep",
           [](StepChannel& self, int64_t timeout_us) {
             const py::gil_scoped_release release;
             return static_cast<int32_t>(self.cancel_sweep(timeout_us));
           })
      .def("rows", &StepChannel::rows)
      .def("revoke", &StepChannel::revoke)
      .def("abort", &StepChannel::abort)
      .def_property_readonly("sweep", &StepChannel::sweep)
      .def_property_readonly("progress", &StepChannel::progress)
      .def_property_readonly("error", [](const StepChannel& self) { return static_cast<uint32_t>(self.error()); });
}

void bind_worker(py::module_& m) {
  py::class_<Worker>(m, "Worker")
      .def(py::init([](const StepShape& shape, const Memory& control, const Memory& step, const Memory& pool,
                       int32_t kv_dtype, int64_t blocks, float scale, float softcap, std::vector<int32_t> windows,
                       int32_t threads, std::vector<int32_t> cpus, int32_t spin_us) {
        WorkerConfig config;
        config.layout = {shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens,
                         static_cast<DType>(kv_dtype)};
        config.blocks = blocks;
        config.scale = scale;
        config.softcap = softcap;
        config.windows = std::move(windows);
        config.threads = threads;
        config.cpus = std::move(cpus);
        config.spin_us = spin_us;
        return std::make_unique<Worker>(StepMemory(shape, span_of(control), span_of(step)), span_of(pool),
                                        std::move(config));
      }))
      .def("start", &Worker::start)
      .def("stop", &Worker::stop, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("running", &Worker::running)
      .def("stats", [](const Worker& self) {
        const WorkerStats stats = self.stats();
        return std::make_tuple(stats.sweeps, stats.rows, stats.kv_bytes_read, stats.busy_ns, stats.waits, stats.wait_us,
                               stats.parks, stats.backlog, stats.layer_ns, stats.layers);
      });
}

}  // namespace
}  // namespace neo

void bind_dataplane(py::module_& m) {
  py::module_ dataplane = m.def_submodule("dataplane", "Control and step memory, channel and worker.");
  dataplane.attr("NONCE_BYTES") = neo::kNonceBytes;
  dataplane.attr("LANES") = neo::kLanes;
  dataplane.attr("LAYER_BOUNDS_US") = neo::kLayerBoundsUs;
  neo::bind_shape(dataplane);
  neo::bind_channel(dataplane);
  neo::bind_worker(dataplane);
}
