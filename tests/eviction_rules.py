"""The rules of docs/eviction.md, written as plainly as they can be: every use sorts a list.

Shares no code with jaxkv's manager. That the rules are vLLM's is tested on what vLLM answered
(test_vllm_policies.py); so they tell what the manager must answer where there is no recording.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from jaxkv.keys import KeyRun, KeyRuns
from jaxkv.offload import LoadStoreSpec, LookupResult, OffloadingManager, PrepareStoreOutput


class Nowhere(LoadStoreSpec):
    """No memory is behind the rules."""


@dataclass
class Record:
    """What one request has used since it came, or since the last reset."""

    seen: dict = field(default_factory=dict)  # key -> position or None, in the order of first use
    missed: set = field(default_factory=set)
    inserted: set = field(default_factory=set)
    reused: set = field(default_factory=set)

    def use(self, keys, positions, reused):
        for key, position in zip(keys, positions, strict=True):
            self.seen.setdefault(key, position)
        self.reused |= reused - self.inserted

    def head_to_tail(self):
        """Keys in the order of the prompt: by position if every key has one, else group after group."""
        groups = {}
        for key in self.seen:
            groups.setdefault(key[-4:], []).append(key)
        ordered = []
        for group in sorted(groups):
            keys = groups[group]
            if all(self.seen[key] is not None for key in keys):
                keys = sorted(keys, key=self.seen.get)
            ordered += keys
        if all(position is not None for position in self.seen.values()):
            ordered.sort(key=self.seen.get)
        return ordered


class LRU:
    def __init__(self, capacity):
        self.order = []  # chunks, the next to be evicted first

    def insert(self, key):
        self.order.append(key)

    def remove(self, key):
        self.order.remove(key)

    def learn(self, key):
        pass

    def touch(self, key, *, readable):
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    def finish(self, key, record):
        self.touch(key, readable=True)

    def pick(self, count, allowed):
        picked = [key for key in self.order if allowed(key)][:count]
        return picked if len(picked) == count else None

    def evict(self, keys):
        for key in keys:
            self.order.remove(key)


class ARC:
    def __init__(self, capacity):
        self.capacity = capacity
        self.once, self.often = [], []  # T1, T2
        self.once_ghosts, self.often_ghosts = [], []  # B1, B2
        self.target = 0.0

    def insert(self, key):
        self.once.append(key)
        for ghosts in (self.once_ghosts, self.often_ghosts):
            if key in ghosts:
                ghosts.remove(key)

    def remove(self, key):
        (self.once if key in self.once else self.often).remove(key)

    def learn(self, key):
        one, two = len(self.once_ghosts), len(self.often_ghosts)
        if key in self.once_ghosts:
            self.target = min(self.target + max(1, two / one), self.capacity)
            self._to_end(self.once_ghosts, key)
        elif key in self.often_ghosts:
            self.target = max(self.target - max(1, one / two), 0)
            self._to_end(self.often_ghosts, key)

    def touch(self, key, *, readable):
        if key in self.once and readable:
            self.once.remove(key)
            self.often.append(key)
        elif key in self.once:
            self._to_end(self.once, key)
        elif key in self.often:
            self._to_end(self.often, key)
        else:
            self.learn(key)

    def finish(self, key, record):
        if key in record.reused and key in self.once:
            self.once.remove(key)
            self.often.append(key)
        elif key in record.inserted | record.reused:
            for chunks in (self.once, self.often):
                if key in chunks:
                    self._to_end(chunks, key)

    def pick(self, count, allowed):
        once = [key for key in self.once if allowed(key)]
        often = [key for key in self.often if allowed(key)]
        if len(once) + len(often) < count:
            return None
        picked, num_once = [], len(self.once)
        for _ in range(count):
            from_once = once and (num_once >= int(self.target) or not often)
            num_once -= bool(from_once)
            picked.append((once if from_once else often).pop(0))
        return picked

    def evict(self, keys):
        for key in keys:
            chunks, ghosts = (
                (self.once, self.once_ghosts) if key in self.once else (self.often, self.often_ghosts)
            )
            chunks.remove(key)
            ghosts.append(key)
        for ghosts in (self.once_ghosts, self.often_ghosts):
            del ghosts[: max(0, len(ghosts) - self.capacity)]

    @staticmethod
    def _to_end(keys, key):
        keys.remove(key)
        keys.append(key)


class Threshold:
    """How often each key was offered; knows a limited number of keys, the most recently offered ones."""

    def __init__(self, threshold, tracker_size):
        self._threshold = threshold
        self._size = tracker_size
        self._counts = OrderedDict()

    def offer(self, keys):
        if self._threshold < 2:
            return
        known = [key for key in keys if key in self._counts]
        for key in known:
            self._counts[key] += 1
            self._counts.move_to_end(key)
        num_older = len(self._counts) - len(known)
        for key in keys:
            if key in self._counts:
                continue
            if len(self._counts) >= self._size:
                if not num_older:
                    continue
                self._counts.popitem(last=False)
                num_older -= 1
            self._counts[key] = 1

    def admits(self, key):
        return self._threshold < 2 or self._counts.get(key, 0) >= self._threshold


def positions_of(keys):
    """Where each key stands in its request, as its run says; ``None`` for keys that came one by one."""
    runs = keys.runs if isinstance(keys, KeyRuns) else [keys]
    return [place for run in runs for place in (run.hashes if isinstance(run, KeyRun) else [None] * len(run))]


class RuleManager(OffloadingManager):
    """Holds ``capacity`` chunks of any group."""

    def __init__(self, policy, capacity, threshold=0, tracker_size=64_000):
        self._make_policy = lambda: {"lru": LRU, "arc": ARC}[policy](capacity)
        self._capacity = capacity
        self._threshold = Threshold(threshold, tracker_size)
        self.reset_cache()

    def reset_cache(self):
        self._policy = self._make_policy()
        self._loads = {}  # key -> number of loads under way, or None while it is written
        self._records = {}

    def lookup(self, key, ctx):
        if key not in self._loads:
            return LookupResult.MISS
        return LookupResult.HIT_PENDING if self._loads[key] is None else LookupResult.HIT

    def prepare_load(self, keys, ctx):
        for key in keys:
            self._loads[key] += 1
        self._record(ctx).use(keys, positions_of(keys), set(keys))

    def complete_load(self, keys, ctx, *, success=True):
        for key in keys:
            if key in self._loads:  # not since a reset
                self._loads[key] -= 1

    def prepare_store(self, keys, ctx):
        positions, keys = positions_of(keys), list(keys)
        self._threshold.offer(keys)
        new = [key for key in keys if key not in self._loads and self._threshold.admits(key)]
        ready = {key for key in keys if self._loads.get(key) is not None}
        record = self._record(ctx)
        for key in reversed(new):
            if key not in record.missed:
                self._policy.learn(key)
                record.missed.add(key)
        used = [pair for pair in zip(keys, positions, strict=True) if pair[0] in {*new, *ready}]
        record.use([key for key, _ in used], [position for _, position in used], ready)
        victims = self._policy.pick(
            max(0, len(new) + len(self._loads) - self._capacity),
            lambda key: self._loads[key] == 0 and key not in keys,
        )
        if victims is None:
            return None
        if victims:
            self._policy.evict(victims)
        for key in victims:
            del self._loads[key]
        for key in new:
            self._policy.insert(key)
            self._loads[key] = None
        record.inserted |= set(new)
        return PrepareStoreOutput(new, Nowhere(), victims)

    def complete_store(self, keys, ctx, *, success=True):
        for key in keys:
            if success and key in self._loads:
                self._loads[key] = 0
            elif key in self._loads:
                del self._loads[key]
                self._policy.remove(key)

    def touch(self, keys, ctx):
        for key in reversed(keys):
            self._policy.touch(key, readable=self._loads.get(key) is not None)

    def on_request_finished(self, ctx):
        record = self._records.pop(ctx.req_id, Record())
        for key in reversed(record.head_to_tail()):
            self._policy.finish(key, record)

    def leaks(self):
        return [f"{key} has {loads} loads" for key, loads in self._loads.items() if loads != 0]

    def _record(self, ctx):
        return self._records.setdefault(ctx.req_id, Record())
