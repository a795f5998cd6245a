"""The host backend's manager against ``manager_model``: every answer, slot and victim, for LRU and ARC."""

import random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from manager_model import FORGOTTEN, PENDING, READABLE, ManagerModel, ModelARC, ModelLRU

from jaxkv.host_pool import load_native
from jaxkv.keys import BlockHash, GroupId, KeyRun, KeyRuns, get_offload_block_hash, get_offload_group
from jaxkv.offload import LookupResult, ReqContext
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.testing.fake_pool import FakePool

SLAB = 4096
SLOT_BYTES = (512, 2048, 300, 1024)
"""Groups 0 and 2 share a stride, and with it slabs and a policy."""
HASHES = [BlockHash(number.to_bytes(16, "little")) for number in range(24)]
ALL_RUNS = [KeyRun(HASHES, GroupId(group), 0, 1, len(HASHES)) for group in range(4)]
CTX = ReqContext("a")
REQUESTS = ["a", "b", "c"]
POLICIES = {"lru": ModelLRU, "arc": ModelARC}
ANSWERS = {READABLE: LookupResult.HIT, PENDING: LookupResult.HIT_PENDING, FORGOTTEN: LookupResult.MISS}


class MirroredPool:
    """A second ``SlotPool`` that is asked the same as the first, and so gives the same slots."""

    def __init__(self, num_slabs):
        self.slots = load_native().SlotPool(num_slabs * SLAB, SLAB)

    def __getattr__(self, name):
        return getattr(self.slots, name)

    def free(self, offsets, epochs):
        return self.slots.free(np.array(offsets, np.int64), np.array(epochs, np.int64))


def places_of(keys):
    """Keys with positions: hash indices where they are runs."""
    if isinstance(keys, KeyRun):
        return list(zip(keys, keys.hashes, strict=True))
    if isinstance(keys, KeyRuns):
        return [place for run in keys.runs for place in places_of(run)]
    return [(key, None) for key in keys]


def run_of(key):
    """A run of this key alone."""
    return KeyRun(HASHES, get_offload_group(key), HASHES.index(get_offload_block_hash(key)), 1, 1)


class Pair:
    """A manager and its model, told the same."""

    def __init__(self, policy, num_slabs, threshold):
        self.pool = FakePool(num_slabs * SLAB, SLAB)
        self.manager = HostOffloadingManager(
            self.pool, SLOT_BYTES, policy, store_threshold=threshold, enable_events=True
        )
        self.model = ManagerModel(MirroredPool(num_slabs), SLOT_BYTES, POLICIES[policy], threshold)
        self.stores, self.loads = [], []

    def prepare_store(self, req, keys):
        expected = self.model.prepare_store(req, places_of(keys))
        output = self.manager.prepare_store(keys, ReqContext(req))
        if expected is None:
            assert output is None
            return
        to_store, offsets, evicted = expected
        assert list(output.keys_to_store) == to_store
        assert list(output.evicted_keys) == evicted
        assert output.store_spec.offsets.tolist() == offsets
        self.stores.append(output.keys_to_store)

    def prepare_stores(self, offers):
        """The stores of a step: as one by one, with the slots of all in one place, group after group."""
        expected = [self.model.prepare_store(req, places_of(keys)) for req, keys in offers]
        output = self.manager.prepare_stores([(keys, ReqContext(req)) for req, keys in offers])
        slots = [
            (get_offload_group(key), offset)
            for answer in expected
            if answer is not None
            for key, offset in zip(answer[0], answer[1], strict=True)
        ]
        for answer, to_store in zip(expected, output.keys_to_store, strict=True):
            assert (to_store if to_store is None else list(to_store)) == (answer and answer[0])
        assert list(output.evicted_keys) == [key for answer in expected if answer for key in answer[2]]
        by_group = [offset for _, offset in sorted(slots, key=lambda slot: slot[0])]
        assert output.store_spec.offsets.tolist() == by_group
        self.stores.append([key for answer in expected if answer for key in answer[0]])

    def complete_store(self, job, *, success):
        keys = self.stores.pop(job)
        self.model.complete_store(keys, success=success)
        self.manager.complete_store(keys, CTX, success=success)

    def prepare_load(self, req, keys):
        expected = self.model.prepare_load(req, places_of(keys))
        assert self.manager.prepare_load(keys, ReqContext(req)).offsets.tolist() == expected
        self.loads.append(keys)

    def complete_load(self, job, *, success):
        keys = self.loads.pop(job)
        self.model.complete_load(keys, success=success)
        self.manager.complete_load(keys, CTX, success=success)

    def touch(self, keys):
        self.model.touch(keys)
        self.manager.touch(keys, CTX)

    def finish(self, req):
        self.model.finish(req)
        self.manager.on_request_finished(ReqContext(req))

    def reset(self):
        self.manager.take_events()
        self.manager.reset_cache()
        self.model.reset([key for event in self.manager.take_events() for key in event.keys])

    def come_to_rest(self):
        while self.stores:
            self.complete_store(0, success=True)
        while self.loads:
            self.complete_load(0, success=True)

    def check(self):
        """Every key is what the model says, and so are the sums."""
        model = self.model
        for run in ALL_RUNS:
            answers = [self.manager.lookup(key, CTX) for key in run]
            assert answers == [ANSWERS[model.state(key)] for key in run]
            found = [answer is not LookupResult.MISS for answer in answers]
            assert self.manager.lookup_prefix(run, CTX).num_found == [*found, False].index(False)
            assert self.manager.lookup_suffix(run, CTX).num_found == [*found[::-1], False].index(False)
        stats = self.manager.get_stats()
        states = [chunk.state for chunk in model.chunks.values()]
        assert stats.num_chunks == len(states) - states.count(FORGOTTEN)
        assert stats.num_quarantined == states.count(FORGOTTEN)
        assert stats.num_busy == sum(chunk.uses > 0 for chunk in model.chunks.values())
        assert len(self.manager.leaks()) == stats.num_busy
        assert {slot.offset for slot in self.pool.live} == {chunk.slot[0] for chunk in model.chunks.values()}

    def shut_down(self):
        self.manager.shutdown()
        assert not self.pool.live
        assert self.manager.leaks() == []


def as_offered(runs, form):
    """Runs as managers are offered them: with positions or without, of several groups, with repeats."""
    return [KeyRuns(runs), runs[0], list(KeyRuns(runs)), list(runs[0]) * 2][form]


@st.composite
def offers(draw):
    runs = []
    for group in sorted(draw(st.sets(st.sampled_from(range(4)), min_size=1, max_size=3))):
        first = draw(st.integers(0, len(HASHES) - 1))
        step = draw(st.integers(1, 2))
        count = draw(st.integers(1, min(9, -(-(len(HASHES) - first) // step))))
        runs.append(KeyRun(HASHES, GroupId(group), first, step, count))
    return as_offered(runs, draw(st.integers(0, 3)))


class Machine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        num_slabs=st.integers(1, 6),
        threshold=st.sampled_from([0, 2]),
    )
    def start(self, policy, num_slabs, threshold):
        self.pair = Pair(policy, num_slabs, threshold)

    @rule(req=st.sampled_from(REQUESTS), keys=offers())
    def prepare_store(self, req, keys):
        self.pair.prepare_store(req, keys)

    @rule(step=st.lists(st.tuples(st.sampled_from(REQUESTS), offers()), max_size=3))
    def prepare_stores(self, step):
        self.pair.prepare_stores(step)

    @rule(data=st.data(), success=st.booleans())
    def complete_store(self, data, success):
        if self.pair.stores:
            self.pair.complete_store(data.draw(st.integers(0, len(self.pair.stores) - 1)), success=success)

    @rule(data=st.data(), req=st.sampled_from(REQUESTS), positioned=st.booleans())
    def prepare_load(self, data, req, positioned):
        if loadable := self.pair.model.can_load():
            keys = data.draw(st.lists(st.sampled_from(loadable), min_size=1, max_size=6))
            self.pair.prepare_load(req, KeyRuns([run_of(key) for key in keys]) if positioned else keys)

    @rule(data=st.data(), success=st.booleans())
    def complete_load(self, data, success):
        if self.pair.loads:
            self.pair.complete_load(data.draw(st.integers(0, len(self.pair.loads) - 1)), success=success)

    @rule(keys=offers())
    def touch(self, keys):
        self.pair.touch(keys)

    @rule(req=st.sampled_from(REQUESTS))
    def finish(self, req):
        self.pair.finish(req)

    @rule()
    def come_to_rest(self):
        self.pair.come_to_rest()

    @rule()
    def reset(self):
        self.pair.reset()

    @invariant()
    def answers_what_the_model_answers(self):
        self.pair.check()

    def teardown(self):
        if hasattr(self, "pair"):
            self.pair.shut_down()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class Walk:
    """Random steps; most of them store, end jobs and requests, so that the pool is full and moving."""

    WEIGHTS: ClassVar = {
        "store": 7,
        "step": 2,
        "stored": 9,
        "load": 5,
        "loaded": 5,
        "touch": 1,
        "finish": 3,
        "reset": 0.1,
    }

    def __init__(self, pair, rng):
        self.pair, self.rng = pair, rng

    def take_step(self):
        (kind,) = self.rng.choices(list(self.WEIGHTS), self.WEIGHTS.values())
        getattr(self, kind)()

    def some_request(self):
        return self.rng.choice(REQUESTS)

    def offer(self):
        runs, rng = [], self.rng
        for group in rng.sample(range(4), rng.randint(1, 3)):
            first, step = rng.randrange(len(HASHES)), rng.choice([1, 1, 2])
            count = min(rng.randint(1, 8), -(-(len(HASHES) - first) // step))
            runs.append(KeyRun(HASHES, GroupId(group), first, step, count))
        return as_offered(runs, rng.choice([0, 0, 0, 1, 2, 3]))

    def store(self):
        self.pair.prepare_store(self.some_request(), self.offer())

    def step(self):
        self.pair.prepare_stores([(self.some_request(), self.offer()) for _ in range(self.rng.randint(0, 4))])

    def stored(self):
        if num_jobs := len(self.pair.stores):
            self.pair.complete_store(self.rng.randrange(num_jobs), success=self.rng.random() < 0.9)

    def load(self):
        if loadable := self.pair.model.can_load():
            keys = self.rng.choices(loadable, k=self.rng.randint(1, 5))
            runs = KeyRuns([run_of(key) for key in keys])
            self.pair.prepare_load(self.some_request(), runs if self.rng.random() < 0.8 else keys)

    def loaded(self):
        if num_jobs := len(self.pair.loads):
            self.pair.complete_load(self.rng.randrange(num_jobs), success=self.rng.random() < 0.9)

    def touch(self):
        self.pair.touch(self.offer())

    def finish(self):
        self.pair.finish(self.some_request())

    def reset(self):
        self.pair.reset()


@pytest.mark.parametrize("threshold", [0, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_random_walks_decide_as_the_model(policy, threshold):
    for seed in range(20):
        rng = random.Random(seed)
        pair = Pair(policy, rng.randint(1, 6), threshold)
        walk = Walk(pair, rng)
        for _ in range(300):
            walk.take_step()
            pair.check()
        pair.shut_down()
