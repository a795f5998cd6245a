"""Which chunk goes: ARC, policies written in Python; and how often a key is offered before it is kept."""

import gc
import weakref
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
from fifo_policy import FIFOPolicy

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash, GroupId, OffloadKey, make_offload_key
from jaxkv.offload import LookupResult, ReqContext
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.offload.policies import find_policy
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing.fake_pool import FakePool

CTX = ReqContext("r")
SLOT, SLAB = 512, 4096
NUM_SLOTS = SLAB // SLOT


def keys(*numbers: int, group: int = 0):
    return [make_offload_key(BlockHash(number.to_bytes(16, "big")), GroupId(group)) for number in numbers]


def numbers_of(found):
    return [int.from_bytes(key[:16], "big") for key in found]


def make_manager(policy, *, num_slabs=1, slot_bytes=(SLOT,), **options):
    pool = FakePool(num_slabs * SLAB, SLAB)
    return HostOffloadingManager(pool, slot_bytes, policy, **options), pool


def store(manager, wanted, req="r"):
    ctx = ReqContext(req)
    output = manager.prepare_store(wanted, ctx)
    assert output is not None
    manager.complete_store(output.keys_to_store, ctx)
    manager.on_request_finished(ctx)
    return output


def evicted_by(manager, *numbers):
    return numbers_of(store(manager, keys(*numbers)).evicted_keys)


def reuse(manager, *numbers):
    ctx = ReqContext("reader")
    manager.prepare_load(keys(*numbers), ctx)
    manager.complete_load(keys(*numbers), ctx)
    manager.on_request_finished(ctx)


# -- ARC -----------------------------------------------------------------------------------------------------


def test_arc_gives_up_chunks_seen_once_before_those_seen_again():
    manager, _ = make_manager("arc")
    for number in range(8):
        store(manager, keys(number))
    reuse(manager, 0, 1)
    assert evicted_by(manager, 8, 9) == [2, 3]


def test_arc_counts_a_request_that_reads_what_it_stored_as_one_use():
    manager, _ = make_manager("arc")
    for number in range(8):
        output = manager.prepare_store(keys(number), CTX)
        manager.complete_store(output.keys_to_store, CTX)
    manager.prepare_load(keys(0), CTX)
    manager.complete_load(keys(0), CTX)
    manager.on_request_finished(CTX)
    reuse(manager, 7)
    assert evicted_by(manager, 8) == [6], (
        "the last one stored is the coldest, but 7 was read by another request"
    )


def test_arc_protects_what_was_seen_once_when_such_chunks_are_missed():
    manager, _ = make_manager("arc")
    for number in range(8):
        store(manager, keys(number))
    reuse(manager, 4, 5, 6, 7)
    assert evicted_by(manager, 10, 11, 12, 13) == [0, 1, 2, 3]
    assert evicted_by(manager, 0, 1, 2, 3) == [13, 7, 6, 5], "0 to 3 are ghosts: T1 shall have 4 slots"
    assert evicted_by(manager, 20) == [12], "it has 7"


def test_arc_adapts_once_for_each_request_and_key():
    manager, _ = make_manager("arc")
    for number in range(8):
        store(manager, keys(number))
    reuse(manager, 4, 5, 6, 7)
    store(manager, keys(10, 11))
    pinned = keys(2, 3, 4, 5, 6, 7, 10, 11)
    manager.prepare_load(pinned, ReqContext("holder"))
    for _ in range(4):
        assert manager.prepare_store(keys(0, 1), CTX) is None
    manager.complete_load(pinned, ReqContext("holder"))
    assert evicted_by(manager, 20, 21, 22) == [2, 3, 11], "T1 is wanted to have 2 slots, not 8"


def test_arc_forgets_ghosts_and_target_at_a_reset():
    manager, _ = make_manager("arc")
    store(manager, keys(*range(8)))
    store(manager, keys(*range(8, 16)))
    manager.reset_cache()
    store(manager, keys(*range(8)))
    reuse(manager, 7)
    assert evicted_by(manager, 20, 21, 22, 23) == [6, 5, 4, 3], "nothing was a ghost, so T1 gives"


# -- policies in Python --------------------------------------------------------------------------------------


class FIFO(FIFOPolicy):
    """The example, and what it was told."""

    made: ClassVar[list] = []

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.calls: list[tuple] = []
        FIFO.made.append(self)

    def remove(self, key: OffloadKey, *, evicted: bool) -> None:
        super().remove(key, evicted=evicted)
        self.calls.append(("remove", *numbers_of([key]), evicted))

    def touch(self, key: OffloadKey) -> None:
        self.calls.append(("touch", *numbers_of([key])))

    def miss_store(self, key: OffloadKey) -> None:
        self.calls.append(("miss", *numbers_of([key])))


class MostRecent(FIFO):
    """Gives up the chunk used last."""

    def victims(self) -> Iterator[OffloadKey]:
        return reversed(self.keys)

    def touch(self, key: OffloadKey) -> None:
        self.keys[key] = self.keys.pop(key)


@pytest.fixture(autouse=True)
def no_policies():
    FIFO.made = []


def test_python_policy_decides():
    manager, _ = make_manager(FIFO)
    store(manager, keys(*range(8)))
    reuse(manager, 0, 1)
    assert evicted_by(manager, 8, 9) == [0, 1]
    manager, _ = make_manager(MostRecent)
    store(manager, keys(*range(8)))
    reuse(manager, 4)
    assert evicted_by(manager, 8, 9) == [4, 0]


def test_python_policy_is_made_for_each_size_with_its_number_of_slots():
    make_manager(FIFO, num_slabs=3, slot_bytes=(512, 2048, 400))
    assert [policy.num_slots for policy in FIFO.made] == [24, 6]


def test_python_policy_hears_of_everything_once():
    manager, _ = make_manager(FIFO)
    (policy,) = FIFO.made
    output = manager.prepare_store(keys(0, 1, 2), CTX)
    assert policy.calls == [("miss", 2), ("miss", 1), ("miss", 0)]
    policy.calls.clear()
    manager.complete_store(output.keys_to_store[:2], CTX)
    manager.complete_store(output.keys_to_store[2:], CTX, success=False)
    assert policy.calls == [("remove", 2, False)]
    manager.touch(keys(0, 1, 2), CTX)
    manager.on_request_finished(CTX)
    assert policy.calls[1:] == [("touch", 1), ("touch", 0)] * 2
    policy.calls.clear()
    store(manager, keys(*range(3, 10)), "other")
    assert ("remove", 0, True) in policy.calls
    policy.calls.clear()
    manager.reset_cache()
    assert len(policy.calls) == NUM_SLOTS
    assert not policy.keys


def test_python_policy_skips_what_is_in_use_or_offered():
    manager, _ = make_manager(FIFO)
    store(manager, keys(*range(8)))
    manager.prepare_load(keys(0, 2), CTX)
    assert numbers_of(manager.prepare_store(keys(1, 8), CTX).evicted_keys) == [3]


def test_slabs_change_owner_under_a_python_policy():
    manager, _ = make_manager(FIFO, num_slabs=2, slot_bytes=(512, 2048))
    store(manager, keys(1, 2, group=1))
    store(manager, keys(*range(8)))
    assert set(store(manager, keys(8)).evicted_keys) == set(keys(1, 2, group=1))


class Broken(FIFO):
    """Raises where it is told to."""

    fails_at = ""

    def insert(self, key: OffloadKey) -> None:
        super().insert(key)
        if self.fails_at == "insert":
            raise RuntimeError("no insert")

    def victims(self) -> Iterator[OffloadKey]:
        match self.fails_at:
            case "victims":
                raise RuntimeError("no victims")
            case "foreign":
                return iter(keys(77))
            case "repeated":
                return iter([next(iter(self.keys))] * 1000)
            case "no key":
                return iter([17])
        return super().victims()


@pytest.mark.parametrize(
    ("fails_at", "error", "match"),
    [
        ("insert", RuntimeError, "no insert"),
        ("victims", RuntimeError, "no victims"),
        ("foreign", ValueError, "does not hold"),
        ("repeated", ValueError, "holds no more"),
        ("no key", TypeError, "bytes"),
    ],
)
def test_error_of_a_python_policy_is_raised_and_leaves_nothing_half_done(monkeypatch, fails_at, error, match):
    manager, pool = make_manager(Broken)
    store(manager, keys(*range(8)))
    monkeypatch.setattr(Broken, "fails_at", fails_at)
    with pytest.raises(error, match=match):
        manager.prepare_store(keys(8, 9), CTX)
    with pytest.raises(error, match=match):
        manager.prepare_stores([(keys(10, 11), CTX), (keys(12), CTX)])
    monkeypatch.undo()
    assert manager.leaks() == []
    assert manager.lookup(*keys(8), CTX) is LookupResult.MISS
    assert manager.get_stats().num_chunks == len(pool.live)
    store(manager, keys(8, 9))
    assert manager.lookup(*keys(9), CTX) is LookupResult.HIT


def test_python_policy_cannot_call_the_manager_it_serves():
    class Curious(FIFO):
        def insert(self, key: OffloadKey) -> None:
            super().insert(key)
            manager.touch([key], CTX)

    manager, _ = make_manager(Curious)
    with pytest.raises(RuntimeError, match="called by a policy"):
        manager.prepare_store(keys(1), CTX)


def test_policy_that_refers_to_its_manager_is_collected_with_it():
    class Attached(FIFO):
        pass

    manager, _ = make_manager(Attached)
    (policy,) = FIFO.made
    policy.owner = manager
    manager.prepare_store(keys(*range(8)), CTX)
    ended = weakref.ref(manager)
    FIFO.made.clear()
    del manager, policy
    gc.collect()
    assert ended() is None


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mru", "jaxkv.offload.policies.NoSuchPolicy", "no_such_module.Policy", "builtins.dict"]
)
def test_unknown_policy_is_named_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"{name}.*\['arc', 'lru'\]"):
        find_policy(name)


def test_policy_is_found_by_name_or_dotted_path():
    assert [find_policy(name) for name in ("lru", "arc")] == ["lru", "arc"]
    assert find_policy("fifo_policy.FIFOPolicy") is FIFOPolicy
    manager, _ = make_manager("fifo_policy.FIFOPolicy")
    store(manager, keys(*range(8)))
    reuse(manager, 0)
    assert evicted_by(manager, 8) == [0]


def test_connector_evicts_by_the_policy_of_its_config():
    group = KVCacheGroupSpec(("kv",), FullAttentionSpec(4, 1, 8, np.float32), 64)
    options = {"host_bytes": "4KiB", "eviction_policy": "fifo_policy.FIFOPolicy", "store_threshold": 1}
    connector = OffloadingConnector(OffloadingConfig.from_dict(options), KVCacheConfig((group,)))
    manager = connector._spec.get_manager()
    store(manager, keys(*range(8)))
    reuse(manager, 0)
    assert evicted_by(manager, 8) == [0]
    connector.shutdown()


# -- threshold -----------------------------------------------------------------------------------------------


def test_key_is_stored_when_it_is_offered_often_enough():
    manager, _ = make_manager("lru", store_threshold=3)
    assert store(manager, keys(1, 2)).keys_to_store == ()
    assert store(manager, keys(1)).keys_to_store == ()
    assert list(store(manager, keys(2, 1)).keys_to_store) == keys(1)
    assert list(store(manager, keys(2, 1)).keys_to_store) == keys(2)
    assert manager.get_stats().num_below_threshold == 4


@pytest.mark.parametrize("threshold", [0, 1])
def test_low_threshold_stores_at_once(threshold):
    manager, _ = make_manager("lru", store_threshold=threshold)
    assert list(store(manager, keys(1)).keys_to_store) == keys(1)
    assert manager.get_stats().num_below_threshold == 0


def test_offers_are_remembered_over_a_reset():
    manager, _ = make_manager("lru", store_threshold=2)
    store(manager, keys(1))
    manager.reset_cache()
    assert list(store(manager, keys(1)).keys_to_store) == keys(1)


def test_key_offered_long_ago_is_forgotten():
    manager, _ = make_manager("lru", store_threshold=2, num_slabs=64)
    store(manager, keys(1, 2))
    store(manager, keys(1))
    store(manager, keys(*range(10, 10 + 64_000 - 1)))
    assert numbers_of(store(manager, keys(2)).keys_to_store) == []
    assert numbers_of(store(manager, keys(2)).keys_to_store) == [2]
