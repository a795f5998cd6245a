"""Invariants 7 and 9 of the connector: nothing a copy reads is reused; stolen slots are noticed."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.errors import SlotError
from jaxkv.keys import BlockHash, GroupId, JobId, make_offload_key
from jaxkv.offload import BackendOptions, DeviceBlocks, ReqContext, TransferJob
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

CTX = ReqContext("r")
GROUP = GroupId(0)
BLOCKS, TOKENS = 32, 16
SPEC = FullAttentionSpec(TOKENS, 1, 8, np.float32)
CONFIG = KVCacheConfig((KVCacheGroupSpec(("kv",), SPEC, BLOCKS),))
SLOT_BYTES = TOKENS * 2 * 8 * 4


@pytest.fixture(params=["cpu", "xla"])
def backend(request):
    made = HostOffloadingSpec(BackendOptions(CONFIG, 1 << 20, transfer_backend=request.param))
    yield made
    made.shutdown()


def make_caches(seed=0):
    random = np.random.default_rng(seed)
    return {"kv": jnp.asarray(random.random((BLOCKS, TOKENS, 2, 8), np.float32))}


@jax.jit
def slowly(caches):
    """The same caches, after a while: what is submitted with them stays under way."""
    one = jax.lax.fori_loop(0, 80, lambda _, x: jnp.tanh(x @ x), jnp.eye(300))[0, 0]
    return jax.tree_util.tree_map(lambda leaf: leaf + one * 0, caches)


def aligned(values):
    """An int32 array that XLA reads where it lies, without a copy of its own."""
    values = np.asarray(values, np.int32)
    raw = np.zeros(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + values.nbytes].view(np.int32)
    array[:] = values
    return array


def keys_of(numbers):
    return [make_offload_key(BlockHash(bytes([number]) * 16), GROUP) for number in numbers]


def job_of(number, block_ids, place):
    return TransferJob(JobId(number), "r", (DeviceBlocks(GROUP, block_ids),), place)


def end(worker, *numbers):
    """Results of jobs, by number, once they have ended."""
    worker.wait([JobId(number) for number in numbers])
    return {result.job_id: result for result in worker.get_finished()}


def store(backend, worker, caches, blocks):
    """Store blocks, each under its own number."""
    manager, keys = backend.get_manager(), keys_of(blocks)
    output = manager.prepare_store(keys, CTX)
    worker.submit_store(job_of(100, np.array(blocks, np.int32), output.store_spec), caches)
    assert end(worker, 100)[100].error is None
    manager.complete_store(keys, CTX)
    return output.store_spec


def test_invariant_07_ids_of_a_store_may_be_written_again_while_it_waits_for_the_caches(backend):
    manager, blocks = backend.get_manager(), list(range(8))
    caches = make_caches()
    worker, expected = backend.get_worker(caches), np.array(caches["kv"])
    worker.submit_store(
        job_of(0, ids := aligned(blocks), manager.prepare_store(keys_of(blocks), CTX).store_spec),
        slowly(caches),
    )
    ids[:] = 31
    assert end(worker, 0)[0].error is None
    manager.complete_store(keys_of(blocks), CTX)
    restored = worker.submit_load(
        job_of(1, np.array(blocks, np.int32), manager.prepare_load(keys_of(blocks), CTX)), make_caches(1)
    )
    assert end(worker, 1)[1].error is None
    np.testing.assert_array_equal(np.array(restored["kv"])[blocks], expected[blocks])
    manager.complete_load(keys_of(blocks), CTX)


def test_invariant_07_buffers_of_a_load_are_not_those_of_the_next_while_it_waits_for_the_caches(backend):
    manager, caches = backend.get_manager(), make_caches()
    worker, expected = backend.get_worker(caches), np.array(caches["kv"])
    first, second = list(range(8)), list(range(8, 16))
    store(backend, worker, caches, first + second)
    target = slowly(make_caches(1))
    target = worker.submit_load(
        job_of(0, ids := aligned(first), manager.prepare_load(keys_of(first), CTX)), target
    )
    ids[:] = 31
    target = worker.submit_load(
        job_of(1, np.array(second, np.int32), manager.prepare_load(keys_of(second), CTX)), target
    )
    assert [result.error for result in end(worker, 0, 1).values()] == [None, None]
    np.testing.assert_array_equal(np.array(target["kv"])[first + second], expected[first + second])
    manager.complete_load(keys_of(first + second), CTX)


class HeldBack:
    """A status that is ready when the test says so."""

    def __init__(self, status):
        self.status = np.asarray(status)
        self.ready = False

    def is_ready(self):
        return self.ready

    def __array__(self, dtype=None, copy=None):
        return np.array(self.status, dtype)


@pytest.mark.parametrize("way", ["offload", "restore"])
def test_invariant_07_a_slot_under_way_is_given_to_nobody_even_when_it_was_freed(backend, way, monkeypatch):
    caches = make_caches()
    worker = backend.get_worker(caches)
    transfer, pool = worker._transfer, backend.pool
    mover, held = transfer.movers[0].mover, []
    real = getattr(mover, way)

    def hold_back(leaves, entries):
        answer = real(leaves, entries)
        *others, status = answer if isinstance(answer, tuple) else (answer,)
        held.append(HeldBack(status))
        return (*others, held[0]) if others else held[0]

    monkeypatch.setattr(mover, way, hold_back)
    slots = transfer.reserve(GROUP, 4).keep()
    if way == "offload":
        ticket = transfer.offload(caches, GROUP, range(4), slots)
    else:
        _, ticket = transfer.restore(caches, GROUP, range(4), slots)
    transfer.release(slots)
    others = [slot for _ in range(pool.max_slots(SLOT_BYTES)) if (slot := pool.try_reserve(SLOT_BYTES))]
    assert {slot.offset for slot in others}.isdisjoint(slot.offset for slot in slots)
    held[0].ready = True
    assert ticket.wait().error is None
    again = [pool.try_reserve(SLOT_BYTES) for _ in range(4)]
    assert {slot.offset for slot in again} == {slot.offset for slot in slots}
    pool.free_slots([*others, *again])


@contextmanager
def given_to_others(backend, place):
    """Slots that were freed belong to somebody else now, who filled them with sevens and finds them so."""
    pool, stale = backend.pool, place.of_group(GroupId(0), 0, len(place))
    taken = [pool.try_reserve(SLOT_BYTES) for _ in stale]
    assert {slot.offset for slot in taken} == {slot.offset for slot in stale}
    assert {slot.epoch for slot in taken}.isdisjoint(slot.epoch for slot in stale)
    for slot in taken:
        pool.view(slot)[:] = bytes([7]) * SLOT_BYTES
    yield
    assert all(bytes(pool.view(slot)) == bytes([7]) * SLOT_BYTES for slot in taken)
    pool.free_slots(taken)


def test_invariant_09_a_load_from_a_slot_given_to_another_chunk_is_a_failure_that_writes_nothing(backend):
    caches, manager = make_caches(), backend.get_manager()
    worker = backend.get_worker(caches)
    place = store(backend, worker, caches, [0, 1, 2])
    manager.reset_cache()
    fresh = make_caches(1)
    expected = np.array(jnp.copy(fresh["kv"]))
    with given_to_others(backend, place):
        fresh = worker.submit_load(job_of(0, np.array([4, 5, 6], np.int32), place), fresh)
        result = end(worker, 0)[0]
    assert "not in use" in result.error
    assert result.num_bytes == 0
    np.testing.assert_array_equal(np.array(fresh["kv"]), expected)


def test_invariant_09_a_store_into_a_slot_given_to_another_chunk_leaves_that_chunk_alone(backend):
    caches, manager = make_caches(), backend.get_manager()
    worker = backend.get_worker(caches)
    place = manager.prepare_store(keys_of([0, 1, 2]), CTX).store_spec
    manager.complete_store(keys_of([0, 1, 2]), CTX, success=False)
    with given_to_others(backend, place):
        worker.submit_store(job_of(0, np.array([0, 1, 2], np.int32), place), caches)
        assert "not in use" in end(worker, 0)[0].error


def test_invariant_09_a_slot_that_is_freed_late_does_not_free_its_next_owner(backend):
    pool = backend.pool
    slot = pool.try_reserve(SLOT_BYTES)
    pool.free(slot)
    owner = pool.try_reserve(SLOT_BYTES)
    assert (owner.offset, owner.epoch != slot.epoch) == (slot.offset, True)
    with pytest.raises(SlotError, match="not in use"):
        pool.free(slot)
    assert pool.used_bytes == SLOT_BYTES
    pool.free(owner)
