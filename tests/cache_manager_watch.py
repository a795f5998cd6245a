"""The manager under test behind a watcher that tells the model what it does and holds it to its contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from random import Random
from typing import Any

from cache_model import CacheModel, Chunk

from jaxkv.keys import OffloadKey
from jaxkv.offload.base import (
    LookupResult,
    OffloadingManager,
    PrepareStoreOutput,
    StepStoreOutput,
)

_GROUP_BYTES = 4


def chunk_of(key: bytes) -> Chunk:
    """What a key names: block hashes are the numbers of prefixes here."""
    return int.from_bytes(key[-_GROUP_BYTES:], "big"), int.from_bytes(key[:-_GROUP_BYTES], "big")


def slots_of(spec: Any) -> Iterator[tuple[int, int]]:
    """Offset and epoch of the slots of a job, in the job's order."""
    return zip(spec.offsets.tolist(), spec.epochs.tolist(), strict=True)


class WatchedManager(OffloadingManager):
    """``refuse`` and ``retry`` are how often a store is refused, and a lookup answered RETRY, for no reason.

    With ``may_skip`` it need not store what it is offered for the first time. ``names`` says which chunk
    each slot was last handed out for, and to which request. ``refused`` are the chunks refused since it was
    cleared.
    """

    def __init__(
        self,
        manager: OffloadingManager,
        model: CacheModel,
        draw: Random,
        counts: Counter,
        *,
        may_skip: bool = False,
    ) -> None:
        self._may_skip = may_skip
        self.refuse = self.retry = 0.0
        self.model = model
        self.names: dict[int, tuple[Chunk, str]] = {}
        self.refused: set[Chunk] = set()
        self.num_pins = self.num_lost = self.num_refused = 0
        self._manager = manager
        self._draw = draw
        self._counts = counts
        self._pins: Counter[OffloadKey] = Counter()
        self._stores: dict[OffloadKey, int] = {}
        self._resets = 0

    # -- lookups ----------------------------------------------------------------------------------------

    def lookup(self, key, ctx):
        if not self.retry:
            return self._manager.lookup(key, ctx)
        if self._draw.random() < self.retry:
            self._counts["lookups told to retry"] += 1
            return LookupResult.RETRY
        return self._manager.lookup(key, ctx)

    def lookup_prefix(self, keys, ctx):
        return super().lookup_prefix(keys, ctx) if self.retry else self._manager.lookup_prefix(keys, ctx)

    def lookup_suffix(self, keys, ctx):
        return super().lookup_suffix(keys, ctx) if self.retry else self._manager.lookup_suffix(keys, ctx)

    # -- loads ------------------------------------------------------------------------------------------

    def prepare_load(self, keys, ctx):
        self._pins.update(keys)
        self.num_pins += len(keys)
        spec = self._manager.prepare_load(keys, ctx)
        named = [self.names[offset][0] for offset, _ in slots_of(spec)]
        assert named == list(map(chunk_of, keys)), "slots of other chunks were handed out"
        return spec

    def complete_load(self, keys, ctx, *, success=True):
        self._pins.subtract(keys)
        self.num_pins -= len(keys)
        self._manager.complete_load(keys, ctx, success=success)

    # -- stores -----------------------------------------------------------------------------------------

    def prepare_store(self, keys, ctx) -> PrepareStoreOutput | None:
        output = None if self._refuses() else self._manager.prepare_store(keys, ctx)
        if output is None:
            self._note_refused(keys)
            return None
        self._note_evicted(output.evicted_keys)
        assert set(output.evicted_keys).isdisjoint(keys), "chunks were evicted to make room for themselves"
        self._note_stored([(keys, output.keys_to_store, ctx)], output.store_spec)
        return output

    def prepare_stores(self, offers) -> StepStoreOutput | None:
        output = None if self._refuses() else self._manager.prepare_stores(offers)
        if output is None:
            return None
        self._note_evicted(output.evicted_keys)
        taken = []
        for (keys, ctx), keys_to_store in zip(offers, output.keys_to_store, strict=True):
            if keys_to_store is None:
                self._note_refused(keys)
            else:
                taken.append((keys, keys_to_store, ctx))
        self._counts["stores of several requests in one job"] += len(taken) > 1
        self._note_stored(taken, output.store_spec)
        return output

    def _refuses(self) -> bool:
        refuses = self.refuse > 0 and self._draw.random() < self.refuse
        self._counts["stores refused at random"] += refuses
        return refuses

    def _note_refused(self, keys: Collection[OffloadKey]) -> None:
        self._counts["stores refused"] += 1
        self.num_lost += 1
        self.num_refused += 1
        self.refused.update(map(chunk_of, keys))

    def _note_evicted(self, evicted: Collection[OffloadKey]) -> None:
        if not evicted:
            return
        self._counts["chunks evicted"] += len(evicted)
        self.num_lost += 1
        assert not any(self._pins[key] for key in evicted), "a chunk in use was evicted"
        assert self._stores.keys().isdisjoint(evicted), "a chunk that is being written was evicted"
        self.model.dropped(map(chunk_of, evicted))

    def _note_stored(self, taken, store_spec) -> None:
        """Remember whose chunk each slot holds: slots come group after group, in the order of the offers."""
        names = []
        for offered, keys_to_store, ctx in taken:
            stored = list(keys_to_store)
            assert self._stores.keys().isdisjoint(stored), "a chunk is being stored twice"
            self._stores.update(dict.fromkeys(stored, self._resets))
            chunks = list(map(chunk_of, stored))
            # What is being stored may fail, and what is offered too seldom is not stored.
            self.model.excused(map(chunk_of, offered) if self._may_skip else chunks)
            names += [(chunk, ctx.req_id) for chunk in chunks]
        names.sort(key=lambda name: name[0][0])
        slots = slots_of(store_spec)
        self.names.update((offset, name) for name, (offset, _) in zip(names, slots, strict=True))

    def complete_store(self, keys, ctx, *, success=True):
        for key in keys:
            if self._stores.pop(key) == self._resets and success:
                self.model.stored([chunk_of(key)])
        self._manager.complete_store(keys, ctx, success=success)

    # -- everything else --------------------------------------------------------------------------------

    def note_reset(self) -> None:
        """All is about to be forgotten."""
        self._resets += 1
        self.num_lost += 1
        self.model.forget_all()

    def check_idle(self) -> None:
        """Nothing is pinned and nothing is being stored."""
        assert not self.num_pins, f"pins are left: {+self._pins}"
        assert not self._stores, f"stores never ended: {self._stores}"

    def reset_cache(self):
        self._manager.reset_cache()

    def touch(self, keys, ctx):
        self._manager.touch(keys, ctx)

    def on_new_request(self, ctx):
        return self._manager.on_new_request(ctx)

    def on_request_finished(self, ctx):
        self._manager.on_request_finished(ctx)

    def on_schedule_end(self):
        self._manager.on_schedule_end()

    def has_pending_work(self):
        return self._manager.has_pending_work()

    def take_events(self):
        return self._manager.take_events()

    def get_stats(self):
        return self._manager.get_stats()

    def leaks(self):
        return self._manager.leaks()

    def shutdown(self):
        self._manager.shutdown()
