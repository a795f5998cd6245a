#include "fake_streams.h"

#include <algorithm>
#include <utility>

namespace jaxkv::cuda {

FakeRuntime::FakeRuntime(uint64_t seed, Schedule schedule) : schedule_(schedule), rng_(seed) {
  if (schedule == Schedule::kBackground) background_ = std::thread([this] { RunInBackground(); });
}

FakeRuntime::~FakeRuntime() {
  {
    const Lock lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  if (background_.joinable()) background_.join();
}

// -- streams and events -------------------------------------------------------------------------------------

Stream FakeRuntime::MakeStream() {
  const Lock lock = Call("MakeStream");
  streams_.push_back(std::make_unique<CUstream_st>());
  streams_.back()->number = streams_.size();
  if (streams_.size() >= kMostStreams) Blame("more streams than the fake can tell apart");
  return streams_.back().get();
}

void FakeRuntime::FreeStream(Stream stream) {
  const Lock lock(mutex_);
  ThrowIfLost("FreeStream");
  if (!stream->is_live) Blame("a stream was freed twice");
  if (!IsKnown(stream->last)) Blame("a stream was freed before its work had ended");
  stream->is_live = false;
}

Event FakeRuntime::MakeEvent() {
  const Lock lock = Call("MakeEvent");
  events_.push_back(std::make_unique<CUevent_st>());
  return events_.back().get();
}

void FakeRuntime::FreeEvent(Event event) {
  const Lock lock(mutex_);
  ThrowIfLost("FreeEvent");
  if (event == nullptr || !event->is_live) return Blame("what was freed is no event");
  if (!IsKnown(event->recorded)) Blame("an event was freed before it was reached");
  event->is_live = false;
}

void FakeRuntime::Record(Event event, Stream stream) {
  const Lock lock = Call("Record");
  if (!event->is_live) return Blame("an event was recorded that was freed");
  event->recorded = Push(stream, "Record", nullptr, nullptr);
}

void FakeRuntime::WaitFor(Stream stream, Event event) {
  const Lock lock = Call("WaitFor");
  if (!event->is_live) return Blame("an event was waited for that was freed");
  if (event->recorded == nullptr) return;
  Join(stream->after, event->recorded->after);
  Push(stream, "WaitFor", nullptr, nullptr)->awaits = event->recorded;
}

bool FakeRuntime::HasEnded(Event event) {
  Lock lock = Call("HasEnded");
  if (event == nullptr || !event->is_live) {
    Blame("an event was asked for that was freed");
    return true;
  }
  RunALittle(lock);
  ThrowIfLost("HasEnded");
  if (event->recorded == nullptr) return true;
  if (event->recorded->done) KnowThat(*event->recorded);
  return event->recorded->done;
}

void FakeRuntime::Synchronize(Stream stream) {
  Lock lock(mutex_);
  ThrowIfLost("Synchronize");
  if (!stream->is_live) Blame("a stream was waited for that was freed");
  RunUntil(stream->last, lock, "Synchronize");
}

void FakeRuntime::Synchronize(Event event) {
  Lock lock(mutex_);
  ThrowIfLost("Synchronize");
  if (event == nullptr) throw CudaError("Synchronize failed: no event");
  if (!event->is_live) Blame("an event was waited for that was freed");
  RunUntil(event->recorded, lock, "Synchronize");
}

int64_t FakeRuntime::ElapsedUs(Event begin, Event end) {
  const Lock lock = Call("ElapsedUs");
  if (!begin->is_live || !end->is_live) Blame("time between events that were freed");
  if (!begin->recorded || !end->recorded || !begin->recorded->done || !end->recorded->done) {
    throw CudaError("ElapsedUs failed: an event was not recorded or has not ended");
  }
  return end->recorded->done_at - begin->recorded->done_at;
}

// -- operations ---------------------------------------------------------------------------------------------

FakeRuntime::OperationPtr FakeRuntime::Push(Stream stream, const char* what,
                                            std::function<Accesses()> accesses,
                                            std::function<void(Random&)> body) {
  if (!stream->is_live) Blame(std::string(what) + " on a stream that was freed");
  auto operation = std::make_shared<FakeOperation>();
  Join(stream->after, known_);
  operation->what = what;
  operation->stream = stream->number;
  operation->index = ++stream->after[stream->number];
  operation->after = stream->after;
  operation->known_early = known_;
  operation->accesses = std::move(accesses);
  operation->body = std::move(body);
  operation->seed = static_cast<uint32_t>(rng_());
  if (!lost_) stream->queue.push_back(operation);
  stream->last = operation;
  changed_.notify_all();
  return operation;
}

void FakeRuntime::Enqueue(Stream stream, const Accesses& accesses, std::function<void()> body) {
  const Lock lock(mutex_);
  if (lost_) return;
  Accesses there = accesses;
  for (auto* ranges : {&there.reads, &there.writes}) {
    for (ByteRange& range : *ranges) range = {OfDevice(range.begin), OfDevice(range.end)};
  }
  Push(
      stream, "a step of the model", [there] { return there; },
      [body = std::move(body)](Random&) { body(); });
}

FakeRuntime::OperationPtr FakeRuntime::Choose(const FakeOperation* target) {
  std::vector<OperationPtr> choices;
  for (const auto& stream : streams_) {
    if (stream->queue.empty()) continue;
    const OperationPtr& next = stream->queue.front();
    const bool may_run = !next->begun && (next->awaits == nullptr || next->awaits->done);
    const bool is_wanted = target == nullptr || next->index <= target->after[next->stream];
    if (may_run && is_wanted) choices.push_back(next);
  }
  if (choices.empty()) return nullptr;
  return choices[static_cast<size_t>(Draw(0, static_cast<int64_t>(choices.size()) - 1))];
}

// Checks what an operation is about to touch. Returns whether it can.
bool FakeRuntime::BeginWork(FakeOperation& operation) {
  operation.begun = true;
  if (!operation.accesses) return false;
  Accesses accesses = operation.accesses();
  if (!memory_.AreLive(accesses) || !memory_.AreLive(operation.early)) {
    Blame(std::string(operation.what) + " touches memory that is not there");
    return false;
  }
  const char* what = operation.what;
  if (accesses.Tidy()) Blame(std::string(what) + " touches bytes twice");
  operation.early.Tidy();
  Footprint late = {what, operation.stream, operation.index, operation.after, std::move(accesses)};
  Footprint early = {what, operation.stream, operation.index, operation.known_early, operation.early};
  for (Footprint* footprint : {&late, &early}) {
    const std::string conflict = log_.Add(std::move(*footprint));
    if (!conflict.empty()) Blame(conflict);
  }
  return true;
}

void FakeRuntime::EndWork(FakeOperation& operation) {
  operation.done = true;
  operation.done_at = ++num_done_;
  operation.awaits = nullptr;
  operation.body = nullptr;
  streams_[operation.stream - 1]->queue.pop_front();
  if (loses_in_ > 0 && --loses_in_ == 0) LoseDevice();
}

// In the background the lock is free while the operation works.
void FakeRuntime::Run(const OperationPtr& operation, Lock& lock) {
  const bool works = BeginWork(*operation);
  Random random(operation->seed);
  if (schedule_ == Schedule::kBackground) lock.unlock();
  if (works) operation->body(random);
  if (schedule_ == Schedule::kBackground) {
    for (uint32_t i = random() % 4; i > 0; --i) std::this_thread::yield();
    lock.lock();
  }
  if (!lost_) EndWork(*operation);
}

void FakeRuntime::RunUntil(const OperationPtr& target, Lock& lock, const char* what) {
  if (target == nullptr) return;
  if (schedule_ == Schedule::kBackground) {
    changed_.wait(lock, [&] { return target->done || lost_; });
  }
  while (!target->done && !lost_) {
    const OperationPtr next = Choose(schedule_ == Schedule::kLate ? target.get() : nullptr);
    if (next == nullptr) {
      Blame("nothing can happen any more");
      LoseDevice();
      break;
    }
    Run(next, lock);
  }
  ThrowIfLost(what);
  KnowThat(*target);
  ForgetOld();
}

void FakeRuntime::RunALittle(Lock& lock) {
  if (schedule_ == Schedule::kBackground) return;
  for (int64_t i = Draw(0, 6); i > 0 && !lost_; --i) {
    const OperationPtr next = Choose(nullptr);
    if (next == nullptr) return;
    Run(next, lock);
  }
}

void FakeRuntime::RunSome() {
  Lock lock(mutex_);
  RunALittle(lock);
}

void FakeRuntime::RunAll() {
  Lock lock(mutex_);
  if (schedule_ == Schedule::kBackground) {
    changed_.wait(lock, [this] {
      return lost_ || std::all_of(streams_.begin(), streams_.end(), [](auto& s) { return s->queue.empty(); });
    });
  }
  for (OperationPtr next = Choose(nullptr); next != nullptr && !lost_; next = Choose(nullptr))
    Run(next, lock);
}

void FakeRuntime::RunInBackground() {
  Lock lock(mutex_);
  for (;;) {
    OperationPtr next;
    changed_.wait(lock, [&] { return ends_ || (next = Choose(nullptr)) != nullptr; });
    if (ends_) return;
    Run(next, lock);
    changed_.notify_all();
  }
}

void FakeRuntime::LoseDevice() {
  lost_ = true;
  for (const auto& stream : streams_) stream->queue.clear();
  changed_.notify_all();
}

}  // namespace jaxkv::cuda
