// Python's view of ChunkIndex: keys as collections of bytes or runs, slots as arrays. Decides nothing.
#include "index_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chunk_index.h"
#include "key_reader.h"
#include "python_policy.h"

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Numbers = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;
using Places = std::vector<uint32_t>;

// Keys that a lookup reads at once; it reads none behind those.
constexpr size_t kAtOnce = 64;

Numbers ToNumpy(const std::vector<SlotRef>& slots, int64_t SlotRef::* field) {
  auto values = std::make_unique<int64_t[]>(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) values[i] = slots[i].*field;
  nb::capsule owner(values.get(), [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  return Numbers(values.release(), {slots.size()}, owner);
}

template <typename KeyAt>
nb::tuple ToTuple(size_t size, const KeyAt& key_at) {
  nb::object keys = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(size)));
  if (!keys.is_valid()) throw nb::python_error();
  for (size_t i = 0; i < size; ++i) {
    PyTuple_SET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(i), ToPython(key_at(i)).release().ptr());
  }
  return nb::borrow<nb::tuple>(keys);
}

nb::tuple ToTuple(const std::vector<OffloadKey>& keys) {
  return ToTuple(keys.size(), [&](size_t i) { return keys[i]; });
}

// All keys of a call.
class Keys {
 public:
  Keys(nb::handle keys, const KeyTypes& types) {
    const KeyReader reader(keys, types);
    keys_.resize(reader.size());
    positions_.resize(reader.size());
    reader.Read(0, reader.size(), keys_.data(), positions_.data());
  }

  size_t size() const { return keys_.size(); }
  KeyBatch batch() const { return {keys_.data(), positions_.data(), keys_.size()}; }
  nb::tuple ToTupleAt(const Places& places) const {
    return ToTuple(places.size(), [&](size_t i) { return keys_[places[i]]; });
  }
  void KeepOnly(const Places& places) {
    for (size_t i = 0; i < places.size(); ++i) keys_[i] = keys_[places[i]];
    keys_.resize(places.size());
  }

 private:
  std::vector<OffloadKey> keys_;
  std::vector<Position> positions_;
};

class IndexHandle {
 public:
  IndexHandle(std::shared_ptr<SlotPool> pool, std::vector<int64_t> slot_bytes, nb::object policy,
              int64_t store_threshold, size_t max_tracked_keys)
      : types_(KeyTypes::Import()),
        policies_(std::make_shared<PythonPolicies>()),
        index_(std::move(pool), std::move(slot_bytes),
               {FindPolicy(std::move(policy)), store_threshold, max_tracked_keys}) {}

  Found Lookup(nb::handle key) {
    const OffloadKey read = KeyFromPython(key);
    Found found;
    index_.Lookup(&read, 1, &found);
    return found;
  }

  // How many keys are no miss, from one end on, and whether all of them are readable.
  std::pair<size_t, bool> LookupPrefix(nb::handle keys) { return CountFound(KeyReader(keys, types_), false); }
  std::pair<size_t, bool> LookupSuffix(nb::handle keys) { return CountFound(KeyReader(keys, types_), true); }

  void BeginRequest(const std::string& request) { index_.BeginRequest(request); }
  void EndRequest(const std::string& request) {
    Call([&] { index_.EndRequest(request); });
  }

  nb::tuple PrepareLoad(const std::string& request, nb::handle keys) {
    const Keys read(keys, types_);
    std::vector<SlotRef> slots(read.size());
    Call([&] { index_.PrepareLoad(request, read.batch(), slots.data()); });
    return nb::make_tuple(ToNumpy(slots, &SlotRef::offset), ToNumpy(slots, &SlotRef::epoch));
  }

  nb::tuple CompleteLoad(nb::handle keys, bool success) {
    const Keys read(keys, types_);
    Places lost;
    Call([&] { lost = index_.CompleteLoad(read.batch(), success); });
    return read.ToTupleAt(lost);
  }

  nb::tuple PrepareStore(const std::string& request, nb::handle keys) {
    Offered offer{request, Keys(keys, types_), {}};
    Call([&] { Prepare(&offer, 1); });
    const StoreOutcome& outcome = offer.outcome;
    nb::object some = offer.all() ? nb::none() : nb::object(offer.keys.ToTupleAt(outcome.to_store));
    return nb::make_tuple(outcome.accepted, some, ToNumpy(outcome.slots, &SlotRef::offset),
                          ToNumpy(outcome.slots, &SlotRef::epoch), ToTuple(outcome.evicted));
  }

  // Offers (request, keys), one after another. Answers for each None if it was refused, else what must be
  // stored: True for all of it, or those keys. Slots come group after group, and within a group in the order
  // of offers and keys.
  nb::tuple PrepareStores(nb::sequence offers) {
    std::vector<Offered> offered;
    for (nb::handle offer : offers) {
      offered.push_back({nb::cast<std::string>(offer[0]), Keys(nb::object(offer[1]), types_), {}});
    }
    Call([&] { Prepare(offered.data(), offered.size()); });
    nb::list answers;
    std::vector<OffloadKey> evicted;
    for (const Offered& offer : offered) {
      const StoreOutcome& outcome = offer.outcome;
      evicted.insert(evicted.end(), outcome.evicted.begin(), outcome.evicted.end());
      if (!outcome.accepted) {
        answers.append(nb::none());
      } else {
        answers.append(offer.all() ? nb::object(nb::bool_(true))
                                   : nb::object(offer.keys.ToTupleAt(outcome.to_store)));
      }
    }
    const std::vector<SlotRef> slots = SlotsByGroup(offered);
    return nb::make_tuple(answers, ToNumpy(slots, &SlotRef::offset), ToNumpy(slots, &SlotRef::epoch),
                          ToTuple(evicted));
  }

  nb::tuple CompleteStore(nb::handle keys, bool success, bool name_keys) {
    const Keys read(keys, types_);
    Places landed;
    Call([&] { landed = index_.CompleteStore(read.batch(), success); });
    return read.ToTupleAt(name_keys ? landed : Places());
  }

  void Touch(nb::handle keys) {
    const Keys read(keys, types_);
    Call([&] { index_.Touch(read.batch()); });
  }

  nb::tuple Reset() {
    std::vector<OffloadKey> removed;
    Call([&] { removed = index_.Reset(); });
    return ToTuple(removed);
  }

  void Abandon() {
    Call([&] { index_.Abandon(); });
  }

  nb::list InUse() const {
    nb::list in_use;
    for (const auto& [key, uses] : index_.InUse()) in_use.append(nb::make_tuple(ToPython(key), uses));
    return in_use;
  }

  IndexCounts counts() const { return index_.counts(); }
  size_t num_requests() const { return index_.num_requests(); }
  PythonPolicies& policies() { return *policies_; }

 private:
  MakeEvictionPolicy FindPolicy(nb::object policy) {
    if (!nb::isinstance<nb::str>(policy)) {
      policies_->make = std::move(policy);
      return [shared = policies_](PolicyContext context) {
        return std::make_unique<PythonPolicy>(context, shared);
      };
    }
    const auto name = nb::cast<std::string>(policy);
    if (name == "lru") return [](PolicyContext context) { return std::make_unique<LruPolicy>(context); };
    if (name == "arc") return [](PolicyContext context) { return std::make_unique<ArcPolicy>(context); };
    throw nb::value_error("an eviction policy is 'lru', 'arc' or a function that makes one");
  }

  // Runs a call that may run Python policies, and raises what they raised.
  template <typename Function>
  void Call(const Function& function) {
    if (in_call_) throw std::runtime_error("the index of chunks was called by a policy, or during its call");
    struct Guard {
      explicit Guard(bool* flag) : flag(flag) { *flag = true; }
      ~Guard() { *flag = false; }
      bool* flag;
    } guard(&in_call_);
    function();
    policies_->Rethrow();
  }

  struct Offered {
    std::string request;
    Keys keys;
    StoreOutcome outcome;

    bool all() const { return outcome.to_store.size() == keys.size(); }
  };

  // If a Python policy fails, nothing of what was offered stays.
  void Prepare(Offered* offers, size_t n) {
    for (size_t i = 0; i < n; ++i) index_.CheckGroups(offers[i].keys.batch());
    WarmUp(offers, n);
    for (size_t i = 0; i < n && policies_->first_error == nullptr; ++i) {
      offers[i].outcome = index_.PrepareStore(offers[i].request, offers[i].keys.batch());
    }
    if (policies_->first_error == nullptr) return;
    for (size_t i = 0; i < n; ++i) {
      if (!offers[i].outcome.accepted) continue;
      offers[i].keys.KeepOnly(offers[i].outcome.to_store);
      index_.CompleteStore(offers[i].keys.batch(), false);
    }
  }

  // Few keys each, scattered over a large table: looked up together, they are waited for together.
  void WarmUp(const Offered* offers, size_t n) const {
    std::vector<OffloadKey> keys;
    for (size_t i = 0; i < n; ++i) {
      const KeyBatch batch = offers[i].keys.batch();
      keys.insert(keys.end(), batch.keys, batch.keys + batch.size);
    }
    std::vector<Found> found(keys.size());
    index_.Lookup(keys.data(), keys.size(), found.data());
  }

  std::vector<SlotRef> SlotsByGroup(const std::vector<Offered>& offers) const {
    std::vector<std::vector<SlotRef>> slots_of_group(index_.num_groups());
    for (const auto& [request, keys, outcome] : offers) {
      for (size_t i = 0; i < outcome.to_store.size(); ++i) {
        slots_of_group[keys.batch().keys[outcome.to_store[i]].group()].push_back(outcome.slots[i]);
      }
    }
    std::vector<SlotRef> slots;
    for (const auto& group : slots_of_group) slots.insert(slots.end(), group.begin(), group.end());
    return slots;
  }

  std::pair<size_t, bool> CountFound(const KeyReader& reader, bool from_end) {
    OffloadKey keys[kAtOnce];
    Position positions[kAtOnce];
    Found found[kAtOnce];
    bool readable = true;
    for (size_t num_read = 0; num_read < reader.size();) {
      const size_t count = std::min(kAtOnce, reader.size() - num_read);
      const size_t first = from_end ? reader.size() - num_read - count : num_read;
      reader.Read(first, count, keys, positions);
      index_.Lookup(keys, count, found);
      if (from_end) std::reverse(found, found + count);
      for (size_t i = 0; i < count; ++i) {
        if (found[i] == Found::kMiss) return {num_read + i, readable};
        readable &= found[i] == Found::kReadable;
      }
      num_read += count;
    }
    return {reader.size(), readable};
  }

  const KeyTypes types_;
  const std::shared_ptr<PythonPolicies> policies_;
  ChunkIndex index_;
  bool in_call_ = false;
};

// A Python policy may refer to what refers to the index.
int Traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<IndexHandle>(self)->policies().Visit(visit, arg) : 0;
}

int Clear(PyObject* self) {
  nb::inst_ptr<IndexHandle>(self)->policies().Clear();
  return 0;
}

PyType_Slot index_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(Traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(Clear)},
                             {0, nullptr}};

}  // namespace

void RegisterIndex(nb::module_& module) {
  nb::enum_<Found>(module, "Found")
      .value("MISS", Found::kMiss)
      .value("READABLE", Found::kReadable)
      .value("PENDING", Found::kPending);
  nb::class_<IndexCounts>(module, "IndexCounts")
      .def_ro("num_chunks", &IndexCounts::num_chunks)
      .def_ro("num_in_use", &IndexCounts::num_in_use)
      .def_ro("num_forgotten", &IndexCounts::num_forgotten)
      .def_ro("num_evicted", &IndexCounts::num_evicted)
      .def_ro("num_below_threshold", &IndexCounts::num_below_threshold);
  nb::class_<IndexHandle>(module, "ChunkIndex", nb::type_slots(index_slots))
      .def(nb::init<std::shared_ptr<SlotPool>, std::vector<int64_t>, nb::object, int64_t, size_t>(),
           nb::arg("pool"), nb::arg("slot_bytes"), nb::arg("policy"), nb::arg("store_threshold"),
           nb::arg("max_tracked_keys"))
      .def("lookup", &IndexHandle::Lookup, nb::arg("key"))
      .def("lookup_prefix", &IndexHandle::LookupPrefix, nb::arg("keys"))
      .def("lookup_suffix", &IndexHandle::LookupSuffix, nb::arg("keys"))
      .def("begin_request", &IndexHandle::BeginRequest, nb::arg("request"))
      .def("end_request", &IndexHandle::EndRequest, nb::arg("request"))
      .def("prepare_load", &IndexHandle::PrepareLoad, nb::arg("request"), nb::arg("keys"))
      .def("complete_load", &IndexHandle::CompleteLoad, nb::arg("keys"), nb::arg("success"))
      .def("prepare_store", &IndexHandle::PrepareStore, nb::arg("request"), nb::arg("keys"))
      .def("prepare_stores", &IndexHandle::PrepareStores, nb::arg("offers"))
      .def("complete_store", &IndexHandle::CompleteStore, nb::arg("keys"), nb::arg("success"),
           nb::arg("name_keys"))
      .def("touch", &IndexHandle::Touch, nb::arg("keys"))
      .def("reset", &IndexHandle::Reset)
      .def("abandon", &IndexHandle::Abandon)
      .def("in_use", &IndexHandle::InUse)
      .def_prop_ro("counts", &IndexHandle::counts)
      .def_prop_ro("num_requests", &IndexHandle::num_requests);
}

}  // namespace jaxkv
