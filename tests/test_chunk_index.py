"""The compiled index takes keys in many forms; what is none of them raises and changes nothing."""

from collections import deque

import pytest

from jaxkv.errors import ConfigError
from jaxkv.host_pool import load_native
from jaxkv.keys import BlockHash, GroupId, KeyRun, KeyRuns

SLAB = 4096
HASHES = [BlockHash(bytes([number]) * 16) for number in range(8)]


def make_index(*slot_bytes, policy="lru"):
    native = load_native()
    pool = native.SlotPool(4 * SLAB, SLAB)
    return native.ChunkIndex(pool, slot_bytes or (512, 2048), policy, 0, 100), pool


RUN = KeyRun(HASHES, GroupId(0), 1, 2, 3)


@pytest.mark.parametrize(
    "keys",
    [
        RUN,
        KeyRuns([RUN[:1], RUN[1:]]),
        KeyRun(tuple(HASHES), GroupId(0), 1, 2, 3),
        KeyRun(deque(HASHES), GroupId(0), 1, 2, 3),
        RUN[::-1],
        list(RUN),
        tuple(RUN),
        set(RUN),
        dict.fromkeys(RUN),
        deque(RUN),
    ],
    ids=lambda keys: type(keys).__name__,
)
def test_keys_may_be_runs_or_any_collection(keys):
    index, _ = make_index()
    assert index.prepare_store("r", keys)[0]
    assert set(index.complete_store(keys, True, True)) == set(RUN)
    assert index.lookup_prefix(list(RUN)) == (3, True)
    assert index.lookup_suffix(keys) == (3, True)
    index.prepare_load("r", keys)
    assert index.complete_load(keys, True) == ()


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (17, TypeError),
        (None, TypeError),
        ([17], TypeError),
        (["text"], TypeError),
        ([bytearray(20)], TypeError),
        ([b"abc"], ValueError),
        ([bytes(37)], ValueError),
        (KeyRun([bytes(33)], GroupId(0), 0, 1, 1), ValueError),
        (KeyRun(["text"], GroupId(0), 0, 1, 1), TypeError),
        (KeyRun(17, GroupId(0), 0, 1, 1), TypeError),
        (KeyRun(HASHES, GroupId(0), 6, 1, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), -1, 1, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, -1, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), 2**40, 1, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, 2**40, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, 2**62, 3), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, 2**63, 3), OverflowError),
        (KeyRun(HASHES, GroupId(0), 0, 1, 2**31 - 1), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, 1, 2**40), IndexError),
        (KeyRun(HASHES, GroupId(0), 0, 1, 2**70), OverflowError),
        (KeyRun(HASHES, GroupId(-1), 0, 1, 3), ValueError),
        (KeyRun(HASHES, GroupId(2**32), 0, 1, 3), ValueError),
        (KeyRun(HASHES, "0", 0, 1, 3), TypeError),
        (KeyRun(HASHES, GroupId(2), 0, 1, 3), ValueError),
    ],
)
def test_bad_keys_raise(keys, error):
    index, pool = make_index()
    with pytest.raises(error):
        index.prepare_store("r", keys)
    assert pool.num_live == 0
    assert index.counts.num_chunks == 0
    with pytest.raises(error):
        index.prepare_load("r", keys)


def test_completions_that_fit_nothing_raise_and_change_nothing():
    index, _ = make_index()
    index.prepare_store("r", RUN)
    other = KeyRun(HASHES, GroupId(0), 0, 1, 2)
    for wrong in (other, list(RUN) * 2):
        with pytest.raises(ValueError, match="prepared"):
            index.complete_store(wrong, True, True)
    with pytest.raises(ValueError, match="prepared"):
        index.complete_load(RUN, True)
    with pytest.raises(ValueError, match="HIT"):
        index.prepare_load("r", RUN)
    index.complete_store(RUN, True, True)
    with pytest.raises(ValueError, match="HIT"):
        index.prepare_load("r", other)
    assert index.in_use() == []


def test_bad_offer_of_a_step_leaves_nothing_of_the_others():
    index, pool = make_index()
    for bad, error in (
        (("r", KeyRun(HASHES, GroupId(2), 0, 1, 3)), ValueError),
        (("r", [17]), TypeError),
        ((17, RUN), RuntimeError),
        (17, TypeError),
        (("r",), IndexError),
    ):
        with pytest.raises(error):
            index.prepare_stores([("r", RUN), bad])
    assert pool.num_live == 0
    with pytest.raises(TypeError):
        index.prepare_stores(17)


@pytest.mark.parametrize("slot_bytes", [(0,), (-1,), (512, 2**63 - 1)])
def test_impossible_slot_sizes_raise(slot_bytes):
    with pytest.raises(ConfigError):
        make_index(*slot_bytes)


@pytest.mark.parametrize("policy", ["mru", ""])
def test_unknown_policy_raises(policy):
    with pytest.raises(ValueError, match="'lru', 'arc'"):
        make_index(policy=policy)


def test_slot_larger_than_a_slab_is_never_found_room_for():
    index, pool = make_index(512, 8192)
    index.prepare_store("r", KeyRun(HASHES, GroupId(0), 0, 1, 8))
    index.complete_store(KeyRun(HASHES, GroupId(0), 0, 1, 8), True, False)
    assert not index.prepare_store("r", KeyRun(HASHES, GroupId(1), 0, 1, 1))[0]
    assert pool.num_live == 8


def test_index_keeps_its_pool():
    index, pool = make_index()
    index.prepare_store("r", RUN)
    del pool
    index.complete_store(RUN, True, False)
    index.abandon()
    assert index.counts.num_chunks == 0
