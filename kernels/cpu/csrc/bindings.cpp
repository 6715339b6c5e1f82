// The extension module. Each part binds itself.
#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& m);
void bind_dataplane(pybind11::module_& m);
void bind_memory(pybind11::module_& m);

PYBIND11_MODULE(_neo_cpu, m) {
  m.doc() = "CPU attention and the shared-memory data plane; use kernels.cpu, its typed face.";
  bind_attention(m);
  bind_dataplane(m);
  bind_memory(m);
}
