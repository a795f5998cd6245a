// The Python module of the CUDA path: devices, pinned pools and FFI targets. Decides nothing.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/copy_probe.h"
#include "cuda/devices.h"
#include "cuda/engine.h"
#include "cuda/handlers.h"
#include "cuda/pinned_pool.h"

namespace nb = nanobind;

namespace jaxkv::cuda {
namespace {

using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const void* AsTag(uintptr_t address) { return reinterpret_cast<const void*>(address); }
uintptr_t AsAddress(const void* tag) { return reinterpret_cast<uintptr_t>(tag); }

// Python's handle on the engine of one device.
class EngineHandle {
 public:
  EngineHandle(int32_t ordinal, int64_t staging_bytes) : engine_(Make(ordinal, staging_bytes)) {}

  void Fit(int64_t record_bytes) {
    nb::gil_scoped_release unlocked;
    engine_.Fit(record_bytes);
  }

  std::optional<uintptr_t> Open(const Numbers& numbers) {
    const void* tag = engine_.Open(numbers.data(), numbers.size());
    return tag == nullptr ? std::nullopt : std::optional<uintptr_t>(AsAddress(tag));
  }

  void AddTag(uintptr_t tag) { engine_.AddTag(AsTag(tag)); }
  bool HasEnded(uintptr_t tag) { return engine_.HasEnded(AsTag(tag)); }

  std::tuple<std::vector<int32_t>, std::string> Close(uintptr_t tag) {
    nb::gil_scoped_release unlocked;
    Outcome outcome = engine_.Close(AsTag(tag));
    return {std::move(outcome.status), std::move(outcome.error)};
  }

  void Abandon(uintptr_t tag) {
    const nb::gil_scoped_release unlocked;
    engine_.Abandon(AsTag(tag));
  }

  void Prefetch(uintptr_t tag, int64_t pool_id, int64_t record_bytes) {
    const nb::gil_scoped_release unlocked;
    engine_.Prefetch(AsTag(tag), pool_id, record_bytes);
  }

  void ForgetPrefetched(int32_t generation, const Numbers& addresses) {
    const nb::gil_scoped_release unlocked;
    engine_.ForgetPrefetched(generation, addresses.data(), addresses.size());
  }

  void Cancel(int32_t number) { engine_.Cancel(number); }
  void Forget(int32_t number) { engine_.Forget(number); }
  std::string staging_refusal() const { return engine_.staging_refusal(); }

  std::tuple<int64_t, int64_t, int64_t, int64_t> way_counts() const {
    const nb::gil_scoped_release unlocked;
    const WayCounts counts = engine_.way_counts();
    return {counts.direct, counts.by_engine, counts.by_kernel, counts.by_host};
  }

  std::tuple<int64_t, int64_t, int32_t> paths() const {
    const Paths paths = engine_.paths();
    return {paths.direct_below_bytes, paths.engine_from_bytes, paths.host_blocks};
  }
  void set_paths(const std::tuple<int64_t, int64_t, int32_t>& paths) {
    engine_.set_paths({std::get<0>(paths), std::get<1>(paths), std::get<2>(paths)});
  }

 private:
  static Engine& Make(int32_t ordinal, int64_t staging_bytes) {
    nb::gil_scoped_release unlocked;
    EngineOptions options;
    options.staging_bytes = staging_bytes;
    return MakeEngine(ordinal, options);
  }

  Engine& engine_;
};

// Python's handle on a probe of the link of one device.
class ProbeHandle {
 public:
  ProbeHandle(int32_t ordinal, int64_t num_bytes) : probe_(RuntimeOf(ordinal), num_bytes) {}

  int64_t TimeUs(bool to_host, int64_t copy_bytes, int32_t host_blocks) {
    const nb::gil_scoped_release unlocked;
    return probe_.TimeUs(to_host ? LinkDirection::kToHost : LinkDirection::kToDevice, copy_bytes,
                         host_blocks);
  }

 private:
  CopyProbe probe_;
};

// Keeps the array until nothing of a device uses its bytes any more, whichever thread finds that out.
std::shared_ptr<void> KeepAlive(const Bytes& array) {
  return {new Bytes(array), [](void* kept) {
            if (!nb::is_alive()) return;
            const nb::gil_scoped_acquire locked;
            delete static_cast<Bytes*>(kept);
          }};
}

// Why the memory could not be pinned; nothing if it was.
std::optional<std::string> PinPool(int32_t ordinal, int64_t pool_id, int32_t generation, const Bytes& bytes) {
  auto owner = KeepAlive(bytes);
  const nb::gil_scoped_release unlocked;
  auto pool = std::make_shared<PinnedPool>(RuntimeOf(ordinal), bytes.data(),
                                           static_cast<int64_t>(bytes.size()), std::move(owner));
  const std::string refusal = pool->refusal();
  PinnedPools::Global().Add({pool_id, generation}, std::move(pool));
  return refusal.empty() ? std::nullopt : std::optional<std::string>(refusal);
}

void UnpinPool(int64_t pool_id, int32_t generation) {
  const nb::gil_scoped_release unlocked;
  PinnedPools::Global().Remove({pool_id, generation});
}

template <typename Handler>
nb::capsule Target(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict FfiTargets() {
  nb::dict targets;
  targets["jaxkv_gather_pages"] = Target(GatherPagesHandler);
  targets["jaxkv_scatter_pages"] = Target(ScatterPagesHandler);
  targets["jaxkv_offload"] = Target(OffloadHandler);
  targets["jaxkv_read_blocks"] = Target(ReadBlocksHandler);
  targets["jaxkv_restore"] = Target(RestoreHandler);
  targets["jaxkv_write_blocks"] = Target(WriteBlocksHandler);
  return targets;
}

// The versions of CUDA that the module was built with and that the driver knows, as 1000 * major + 10 *
// minor. The driver's is 0 where there is none.
std::tuple<int, int> Versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

void TranslateErrors(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const CudaError& error) {
    PyErr_SetString(nb::module_::import_("jaxkv.errors").attr("NativeError").ptr(), error.what());
  }
}

NB_MODULE(_cuda, module) {
  module.doc() = "Moves pages between the memory of CUDA devices and host pools.";
  nb::register_exception_translator(TranslateErrors);
  nb::class_<EngineHandle>(module, "Engine")
      .def(nb::init<int32_t, int64_t>(), nb::arg("ordinal"), nb::arg("staging_bytes"))
      .def("fit", &EngineHandle::Fit, nb::arg("record_bytes"))
      .def("open", &EngineHandle::Open, nb::arg("numbers"))
      .def("add_tag", &EngineHandle::AddTag, nb::arg("address"))
      .def("has_ended", &EngineHandle::HasEnded, nb::arg("tag"))
      .def("close", &EngineHandle::Close, nb::arg("tag"))
      .def("abandon", &EngineHandle::Abandon, nb::arg("tag"))
      .def("prefetch", &EngineHandle::Prefetch, nb::arg("tag"), nb::arg("pool_id"), nb::arg("record_bytes"))
      .def("forget_prefetched", &EngineHandle::ForgetPrefetched, nb::arg("generation"), nb::arg("addresses"))
      .def("cancel", &EngineHandle::Cancel, nb::arg("number"))
      .def("forget", &EngineHandle::Forget, nb::arg("number"))
      .def_prop_ro("staging_refusal", &EngineHandle::staging_refusal)
      .def_prop_ro("way_counts", &EngineHandle::way_counts)
      .def_prop_rw("paths", &EngineHandle::paths, &EngineHandle::set_paths);
  nb::class_<ProbeHandle>(module, "CopyProbe")
      .def(nb::init<int32_t, int64_t>(), nb::arg("ordinal"), nb::arg("num_bytes"))
      .def("time_us", &ProbeHandle::TimeUs, nb::arg("to_host"), nb::arg("copy_bytes"),
           nb::arg("host_blocks"));
  module.def("pin_pool", &PinPool, nb::arg("ordinal"), nb::arg("pool_id"), nb::arg("generation"),
             nb::arg("data"));
  module.def("unpin_pool", &UnpinPool, nb::arg("pool_id"), nb::arg("generation"));
  module.def("ffi_targets", &FfiTargets);
  module.def("versions", &Versions);
}

}  // namespace
}  // namespace jaxkv::cuda
