// Registers the bookkeeping of slots with Python.
#ifndef JAXKV_SLOTS_MODULE_H_
#define JAXKV_SLOTS_MODULE_H_

#include <nanobind/nanobind.h>

namespace jaxkv {

void RegisterSlots(nanobind::module_& module);

}  // namespace jaxkv

#endif  // JAXKV_SLOTS_MODULE_H_
