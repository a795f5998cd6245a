// Registers what benchmarks compare with. Nothing else uses it.
#ifndef JAXKV_BENCH_MODULE_H_
#define JAXKV_BENCH_MODULE_H_

#include <nanobind/nanobind.h>

namespace jaxkv {

void RegisterBench(nanobind::module_& module);

}  // namespace jaxkv

#endif  // JAXKV_BENCH_MODULE_H_
