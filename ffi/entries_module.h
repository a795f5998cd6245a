// Registers the making of entries with Python.
#ifndef JAXKV_ENTRIES_MODULE_H_
#define JAXKV_ENTRIES_MODULE_H_

#include <nanobind/nanobind.h>

namespace jaxkv {

void RegisterEntries(nanobind::module_& module);

}  // namespace jaxkv

#endif  // JAXKV_ENTRIES_MODULE_H_
