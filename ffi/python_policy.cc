#include "python_policy.h"

#include <utility>

#include "key_reader.h"

namespace nb = nanobind;
using namespace nanobind::literals;

namespace jaxkv {

int PythonPolicies::Visit(visitproc visit, void* arg) {
  Py_VISIT(make.ptr());
  for (const nb::object& policy : policies) Py_VISIT(policy.ptr());
  return 0;
}

void PythonPolicies::Clear() {
  make = nb::none();
  for (nb::object& policy : policies) policy = nb::none();
}

PythonPolicy::PythonPolicy(PolicyContext context, std::shared_ptr<PythonPolicies> shared)
    : EvictionPolicy(context),
      shared_(std::move(shared)),
      number_(static_cast<uint32_t>(shared_->policies.size())) {
  shared_->policies.push_back(nb::none());
}

void PythonPolicy::SetCapacity(int64_t num_slots) {
  if (num_slots == num_slots_) return;
  policy() = shared_->make(num_slots);
  num_slots_ = num_slots;
}

template <typename Call>
void PythonPolicy::Guarded(const Call& call) {
  try {
    call();
  } catch (...) {
    shared_->Catch();
  }
}

bool PythonPolicy::Has(KeyId id) const {
  const RankNode& node = (*context_.nodes)[id];
  return node.where != RankNode::kNowhere && node.before == number_;
}

void PythonPolicy::Insert(KeyId id, uint64_t rank) {
  RankNode& node = (*context_.nodes)[id];
  node.rank = rank;
  node.where = RankNode::kInLine;
  node.before = number_;
  ++num_chunks_;
  Guarded([&] { policy().attr("insert")(ToPython((*context_.keys)[id].key)); });
}

void PythonPolicy::Leave(KeyId id, bool evicted) {
  (*context_.nodes)[id].where = RankNode::kNowhere;
  --num_chunks_;
  Guarded([&] { policy().attr("remove")(ToPython((*context_.keys)[id].key), "evicted"_a = evicted); });
}

bool PythonPolicy::Touch(KeyId id, uint64_t rank) {
  if (!Has(id)) return false;
  (*context_.nodes)[id].rank = rank;
  Guarded([&] { policy().attr("touch")(ToPython((*context_.keys)[id].key)); });
  return true;
}

bool PythonPolicy::EndRequest(KeyId id, AccessKind kind, uint64_t rank) {
  if (!Has(id)) return false;
  (*context_.nodes)[id].rank = rank;
  Guarded([&] {
    policy().attr("end_request")(ToPython((*context_.keys)[id].key),
                                 "inserted"_a = kind == AccessKind::kInserted,
                                 "reused"_a = kind == AccessKind::kReused);
  });
  return true;
}

void PythonPolicy::MissStore(KeyId id) {
  Guarded([&] { policy().attr("miss_store")(ToPython((*context_.keys)[id].key)); });
}

void PythonPolicy::BeginPlan() {
  victims_.reset();
  victim_ = kNoKey;
  num_named_ = 0;
}

KeyId PythonPolicy::NextVictim() {
  while (victim_ == kNoKey || Judge(victim_) != Verdict::kTake) {
    victim_ = kNoKey;
    Guarded([&] { victim_ = Advance(); });
    if (victim_ == kNoKey) break;
  }
  return victim_;
}

KeyId PythonPolicy::Advance() {
  if (shared_->first_error != nullptr) return kNoKey;
  if (!victims_.is_valid()) victims_ = nb::iter(policy().attr("victims")());
  const nb::object next = nb::steal(PyIter_Next(victims_.ptr()));
  if (!next.is_valid()) {
    if (PyErr_Occurred() != nullptr) throw nb::python_error();
    return kNoKey;
  }
  const OffloadKey key = KeyFromPython(next);
  KeyId id;
  context_.keys->Find(&key, 1, &id);
  if (++num_named_ > num_chunks_ || id == kNoKey || !Has(id)) {
    PyErr_Format(PyExc_ValueError, "%R names %R as a victim, which it does not hold, or holds no more",
                 policy().ptr(), next.ptr());
    throw nb::python_error();
  }
  return id;
}

}  // namespace jaxkv
