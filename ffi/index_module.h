// Registers the index of chunks with Python.
#ifndef JAXKV_INDEX_MODULE_H_
#define JAXKV_INDEX_MODULE_H_

#include <nanobind/nanobind.h>

namespace jaxkv {

void RegisterIndex(nanobind::module_& module);

}  // namespace jaxkv

#endif  // JAXKV_INDEX_MODULE_H_
