// The Python module: importing tdkd._C loads this library, whose static initialisers register the
// kernels of every other file with PyTorch's dispatcher.
#include <Python.h>

#include "tensors.h"

namespace {

std::string cpu_capability() { return tdkd::name_of(tdkd::choose_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tdkd, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(tdkd, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
