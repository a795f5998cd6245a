#include "key_reader.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace nb = nanobind;

namespace jaxkv {
namespace {

constexpr size_t kAhead = 8;

// `bytes` and, if there is one, the end of the key that follows them.
void MakeKey(PyObject* bytes, const uint8_t* end, OffloadKey* key) {
  if (!PyBytes_Check(bytes)) {
    PyErr_Format(PyExc_TypeError, "keys and block hashes are bytes, got %R", Py_TYPE(bytes));
    throw nb::python_error();
  }
  const auto length = static_cast<size_t>(PyBytes_GET_SIZE(bytes));
  const size_t size = length + (end != nullptr ? OffloadKey::kGroupBytes : 0);
  if (size > OffloadKey::kMaxBytes || size < OffloadKey::kGroupBytes) {
    PyErr_Format(PyExc_ValueError, "a key has %zu to %zu bytes, the last %zu of them for its group; got %zu",
                 OffloadKey::kGroupBytes, OffloadKey::kMaxBytes, OffloadKey::kGroupBytes, size);
    throw nb::python_error();
  }
  std::memset(key, 0, sizeof(*key));
  std::memcpy(key->bytes, PyBytes_AS_STRING(bytes), length);
  if (end != nullptr) std::memcpy(key->bytes + length, end, OffloadKey::kGroupBytes);
  key->size = static_cast<uint8_t>(size);
}

nb::object Interned(const char* name) {
  nb::object interned = nb::steal(PyUnicode_InternFromString(name));
  if (!interned.is_valid()) throw nb::python_error();
  return interned;
}

int64_t IntAttribute(nb::handle object, nb::handle name) {
  const int64_t value = PyLong_AsLongLong(nb::object(object.attr(name)).ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return value;
}

}  // namespace

KeyTypes KeyTypes::Import() {
  const nb::module_ keys = nb::module_::import_("jaxkv.keys");
  return {keys.attr("KeyRun"), keys.attr("KeyRuns"),     Interned("runs"),  Interned("hashes"),
          Interned("group"),   Interned("block_hashes"), Interned("start"), Interned("step")};
}

nb::bytes ToPython(const OffloadKey& key) { return nb::bytes(key.bytes, key.size); }

OffloadKey KeyFromPython(nb::handle key) {
  OffloadKey read;
  MakeKey(key.ptr(), nullptr, &read);
  return read;
}

KeyReader::KeyReader(nb::handle keys, const KeyTypes& types) {
  if (keys.type().is(types.key_run)) {
    AddRun(keys, types);
  } else if (keys.type().is(types.key_runs)) {
    for (nb::handle run : nb::tuple(keys.attr(types.runs))) AddRun(run, types);
  } else {
    nb::object items = nb::steal(PySequence_Fast(keys.ptr(), "expected a collection of keys"));
    if (!items.is_valid()) throw nb::python_error();
    size_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
    parts_.push_back({std::move(items), 0, 1, size_, false, {}});
  }
}

void KeyReader::AddRun(nb::handle run, const KeyTypes& types) {
  const nb::object hashes = run.attr(types.hashes);
  const int64_t group = IntAttribute(run, types.group);
  if (group < 0 || group > std::numeric_limits<uint32_t>::max()) {
    throw nb::value_error("a group has a number from 0 to 2**32 - 1");
  }
  Part part{run.attr(types.block_hashes),
            IntAttribute(hashes, types.start),
            IntAttribute(hashes, types.step),
            nb::len(hashes),
            true,
            {}};
  if (!PyList_Check(part.items.ptr()) && !PyTuple_Check(part.items.ptr())) {
    part.items = nb::steal(PySequence_Fast(part.items.ptr(), "expected a sequence of block hashes"));
    if (!part.items.is_valid()) throw nb::python_error();
  }
  for (size_t i = 0; i < OffloadKey::kGroupBytes; ++i) {
    part.group_bytes[i] = static_cast<uint8_t>(group >> 8 * (OffloadKey::kGroupBytes - 1 - i));
  }
  CheckInside(part, 0, part.count);
  size_ += part.count;
  parts_.push_back(std::move(part));
}

void KeyReader::CheckInside(const Part& part, size_t first, size_t n) {
  if (n == 0) return;
  const int64_t num_items = PySequence_Fast_GET_SIZE(part.items.ptr());
  // In floating point, where nothing overflows; what is close to the limits is far outside.
  const double start = static_cast<double>(part.first) + static_cast<double>(part.step) * first;
  const double last = start + static_cast<double>(part.step) * (n - 1);
  if (std::min(start, last) >= 0 && std::max(start, last) < num_items) return;
  PyErr_Format(PyExc_IndexError, "a run of keys lies outside its %lld block hashes",
               static_cast<long long>(num_items));
  throw nb::python_error();
}

void KeyReader::Read(size_t first, size_t n, OffloadKey* keys, Position* positions) const {
  for (const Part& part : parts_) {
    if (first >= part.count) {
      first -= part.count;
      continue;
    }
    const size_t count = std::min(n, part.count - first);
    ReadPart(part, first, count, keys, positions);
    first = 0;
    n -= count;
    keys += count;
    positions += count;
    if (n == 0) return;
  }
}

void KeyReader::ReadPart(const Part& part, size_t first, size_t n, OffloadKey* keys, Position* positions) {
  CheckInside(part, first, n);  // Again: lists may have become shorter.
  PyObject** objects = PySequence_Fast_ITEMS(part.items.ptr());
  int64_t at = part.first + static_cast<int64_t>(first) * part.step;
  for (size_t i = 0; i < n; ++i, at += part.step) {
    if (i + kAhead < n) Prefetch(objects[at + static_cast<int64_t>(kAhead) * part.step]);
    MakeKey(objects[at], part.is_run ? part.group_bytes : nullptr, &keys[i]);
    positions[i] = part.is_run ? static_cast<Position>(at) : kNoPosition;
  }
}

}  // namespace jaxkv
