// The Python module: registers what the other files define and names their errors. Decides nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bench_module.h"
#include "copy_loops.h"
#include "entries_module.h"
#include "handlers.h"
#include "index_module.h"
#include "large_pages.h"
#include "pool.h"
#include "slots.h"
#include "slots_module.h"

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

class OptionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class ForkedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Python's handle on one arena. Everyone else finds the arena by its key, and only while it is open.
class ArenaHandle {
 public:
  explicit ArenaHandle(int64_t num_bytes) {
    nb::gil_scoped_release unlocked;
    Register(std::make_shared<Arena>(num_bytes));
  }

  // An arena that other processes find by this process, the file descriptor and the nonce, until it is
  // closed.
  static std::unique_ptr<ArenaHandle> CreateShared(int64_t num_bytes, const std::string& nonce) {
    nb::gil_scoped_release unlocked;
    SharedFile file = SharedFile::Create(num_bytes, nonce);
    auto arena = std::make_shared<Arena>(file);
    return std::unique_ptr<ArenaHandle>(new ArenaHandle(std::move(arena), std::move(file)));
  }

  // The arena of another process.
  static std::unique_ptr<ArenaHandle> Attach(pid_t pid, int fd, int64_t num_bytes, const std::string& nonce) {
    nb::gil_scoped_release unlocked;
    auto arena = std::make_shared<Arena>(SharedFile::Open(pid, fd, num_bytes, nonce));
    return std::unique_ptr<ArenaHandle>(new ArenaHandle(std::move(arena), std::nullopt));
  }

  ~ArenaHandle() { Close(); }

  // The memory goes back when the last copy or view that uses it ends.
  void Close() {
    file_.reset();
    nb::gil_scoped_release unlocked;
    PoolRegistry::Global().Remove(key_);
  }

  std::optional<int> shared_fd() const { return file_ ? std::optional<int>(file_->fd()) : std::nullopt; }
  bool closed() const { return PoolRegistry::Global().Find(key_) == nullptr; }
  int64_t pool_id() const { return key_.id; }
  int32_t generation() const { return key_.generation; }
  int64_t num_bytes() const { return num_bytes_; }
  bool huge_pages() const { return huge_pages_; }

  Bytes View(int64_t offset, int64_t length) const {
    auto arena = PoolRegistry::Global().Find(key_);
    if (arena == nullptr) throw ClosedError("the host pool was closed; open a new one");
    if (!arena->owned_by_this_process()) {
      throw ForkedError("the host pool belongs to the parent process; open a new one after fork");
    }
    if (!arena->Contains(offset, length)) throw nb::index_error("view outside the host pool");
    uint8_t* data = arena->data() + offset;
    auto keep = std::make_unique<std::shared_ptr<Arena>>(std::move(arena));
    nb::capsule owner(keep.get(), [](void* p) noexcept { delete static_cast<std::shared_ptr<Arena>*>(p); });
    keep.release();
    return Bytes(data, {static_cast<size_t>(length)}, owner);
  }

 private:
  ArenaHandle(std::shared_ptr<Arena> arena, std::optional<SharedFile> file) : file_(std::move(file)) {
    Register(std::move(arena));
  }

  void Register(std::shared_ptr<Arena> arena) {
    num_bytes_ = arena->num_bytes();
    huge_pages_ = arena->huge_pages();
    key_ = PoolRegistry::Global().Add(std::move(arena));
  }

  PoolKey key_;
  int64_t num_bytes_;
  bool huge_pages_;
  std::optional<SharedFile> file_;  // Open while other processes may attach.
};

// The loop that copies pages. Copies go well by another one where JAXKV_COPY names what does not run here,
// but whoever set it wants to know.
std::string CopyLoopName() {
  if (!RefusedCopyLoop()) return ActiveCopyLoop().name;
  std::string known;
  for (const CopyLoop& loop : CopyLoops()) {
    if (loop.runs_here()) known += (known.empty() ? "" : ", ") + std::string(loop.name);
  }
  throw OptionError("JAXKV_COPY is \"" + *RefusedCopyLoop() + "\", but this machine copies by " + known +
                    "; leave it unset for the fastest");
}

template <typename Handler>
nb::capsule Target(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict FfiTargets() {
  CopyLoopName();
  nb::dict targets;
  targets["jaxkv_gather_pages"] = Target(GatherPagesHandler);
  targets["jaxkv_scatter_pages"] = Target(ScatterPagesHandler);
  targets["jaxkv_offload"] = Target(OffloadHandler);
  targets["jaxkv_read_blocks"] = Target(ReadBlocksHandler);
  targets["jaxkv_restore"] = Target(RestoreHandler);
  targets["jaxkv_write_blocks"] = Target(WriteBlocksHandler);
  return targets;
}

void RaisePythonError(const char* name, const std::exception& error) {
  PyErr_SetString(nb::module_::import_("jaxkv.errors").attr(name).ptr(), error.what());
}

void TranslateErrors(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const ClosedError& error) {
    RaisePythonError("PoolClosedError", error);
  } catch (const ForkedError& error) {
    RaisePythonError("PoolForkedError", error);
  } catch (const AllocationError& error) {
    RaisePythonError("ConfigError", error);
  } catch (const SizeError& error) {
    RaisePythonError("ConfigError", error);
  } catch (const OptionError& error) {
    RaisePythonError("ConfigError", error);
  }
}

NB_MODULE(_native, module) {
  module.doc() = "Host memory arenas, the slots they are divided into, and the FFI targets that move pages.";
  nb::register_exception_translator(TranslateErrors);
  nb::class_<ArenaHandle>(module, "Arena")
      .def(nb::init<int64_t>(), nb::arg("num_bytes"))
      .def_static("create_shared", &ArenaHandle::CreateShared, nb::arg("num_bytes"), nb::arg("nonce"))
      .def_static("attach", &ArenaHandle::Attach, nb::arg("pid"), nb::arg("fd"), nb::arg("num_bytes"),
                  nb::arg("nonce"))
      .def("close", &ArenaHandle::Close)
      .def("view", &ArenaHandle::View, nb::arg("offset"), nb::arg("num_bytes"))
      .def_prop_ro("closed", &ArenaHandle::closed)
      .def_prop_ro("pool_id", &ArenaHandle::pool_id)
      .def_prop_ro("generation", &ArenaHandle::generation)
      .def_prop_ro("num_bytes", &ArenaHandle::num_bytes)
      .def_prop_ro("huge_pages", &ArenaHandle::huge_pages)
      .def_prop_ro("shared_fd", &ArenaHandle::shared_fd);
  RegisterEntries(module);
  RegisterSlots(module);
  RegisterIndex(module);
  RegisterBench(module);
  module.def("ffi_targets", &FfiTargets);
  module.def("copy_loop", &CopyLoopName);
  module.def("gather_into_large_pages", &GatherIntoLargePages, nb::arg("address"), nb::arg("num_bytes"),
             nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace jaxkv
