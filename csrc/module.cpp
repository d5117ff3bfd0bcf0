// The Python module: importing tdkd._C loads this library, whose static initialisers register the
// kernels of every other file with PyTorch's dispatcher.
#include <Python.h>

#include "tensors.h"

namespace {

/// Of the operators' schemas, as tdkd/kernels/backends.py has it.
int64_t schema_version() { return 1; }

std::string cpu_capability() { return tdkd::name_of(tdkd::choose_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tdkd, m) {
  m.def("schema_version() -> int");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tdkd, CompositeExplicitAutograd, m) {
  m.impl("schema_version", TORCH_BOX(&schema_version));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
