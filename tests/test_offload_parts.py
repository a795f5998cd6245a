"""Small parts of the offload layer: what is handed on, who is waited for, and what an error says."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import jaxkv.offload.host as host_module
from jaxkv.errors import CacheMismatchError, PoolClosedError, PoolInUseError
from jaxkv.keys import BlockHash, GroupId, make_offload_key
from jaxkv.offload import BackendOptions, LookupResult, PrefixLookup, ReqContext
from jaxkv.offload.claims import claim, release
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.offload.host_worker import HostOffloadingWorker, _RunningJob
from jaxkv.offload.policies import CachePolicy, find_policy
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing.fake_pool import FakePool
from jaxkv.transfer.ticket import TransferResult

CTX = ReqContext("r")
CONFIG = KVCacheConfig((KVCacheGroupSpec(("a",), FullAttentionSpec(4, 1, 8, np.float32), 6),))
KEYS = [make_offload_key(BlockHash(bytes([number]) * 16), GroupId(0)) for number in range(2)]


def test_policy_is_found_however_deep_its_module_is():
    assert find_policy("jaxkv.offload.policies.CachePolicy") is CachePolicy


def test_what_is_claimed_twice_is_named_and_free_after_one_release():
    class Pool:
        def __repr__(self):
            return "the pool"

    pool = Pool()
    claim(pool)
    with pytest.raises(PoolInUseError, match=r"^the pool belongs to another connector; .* of its own$"):
        claim(pool)
    for _ in range(2):
        release(pool)
    claim(pool)
    release(pool)


def test_request_that_may_not_load_from_the_host_finds_nothing_there():
    manager = HostOffloadingManager(FakePool(4096, 4096), (512,))
    manager.prepare_store(KEYS, CTX)
    manager.complete_store(KEYS, CTX)
    elsewhere = replace(CTX, load_tiers=frozenset({"disk"}))
    assert manager.lookup(KEYS[0], CTX) is LookupResult.HIT
    assert manager.lookup(KEYS[0], elsewhere) is LookupResult.MISS
    for lookup in (manager.lookup_prefix, manager.lookup_suffix):
        assert lookup(KEYS, CTX) == PrefixLookup(len(KEYS))
        assert lookup(KEYS, elsewhere) == PrefixLookup(0)


def test_manager_whose_pool_was_closed_says_what_to_do():
    pool = FakePool(4096, 4096)
    manager = HostOffloadingManager(pool, (512,))
    pool.closed = True
    for prepare in (manager.prepare_load, manager.prepare_store):
        with pytest.raises(PoolClosedError, match=r"^the host pool was closed; open a new one, and a conn"):
            prepare(KEYS, CTX)
    with pytest.raises(PoolClosedError):
        manager.prepare_stores([(KEYS, CTX)])


def test_host_manager_is_made_with_the_threshold_and_the_events_of_the_options():
    spec = HostOffloadingSpec(BackendOptions(CONFIG, 1 << 20, store_threshold=2, enable_events=True))
    manager = spec.get_manager()
    assert list(manager.prepare_store(KEYS, CTX).keys_to_store) == []
    assert list(manager.prepare_store(KEYS, CTX).keys_to_store) == KEYS
    manager.complete_store(KEYS, CTX)
    (event,) = manager.take_events()
    assert (event.keys, event.removed) == (tuple(KEYS), False)
    spec.shutdown()


@pytest.fixture
def made(monkeypatch):
    """A host backend that only notes what its worker would be made from."""
    told = SimpleNamespace(record_bytes=512, reasons={})

    def canonicalize(*arguments, **options):
        told.canonical = (arguments, options)
        record = SimpleNamespace(record_bytes=told.record_bytes)
        return SimpleNamespace(records=[record], per_shard_layers=told.reasons)

    def make_transfer(*arguments, **options):
        told.transfer = (arguments, options)

    monkeypatch.setattr(host_module, "canonicalize", canonicalize)
    monkeypatch.setattr(host_module, "BlockTransfer", make_transfer)
    options = BackendOptions(
        CONFIG,
        1 << 20,
        hints={"a": None},
        transfer_backend="xla",
        data_shard=1,
        layerwise_loads=True,
        portable_pages=True,
        blocks_per_chunk=2,
    )
    told.spec = HostOffloadingSpec(options)
    yield told
    told.spec.shutdown()


def test_worker_is_made_with_what_the_options_say_of_layouts_and_copies(made):
    made.spec.get_worker("caches")
    assert made.canonical == (("caches", CONFIG, {"a": None}), {"portable_pages": True})
    (_, pool), options = made.transfer
    assert pool is made.spec.pool
    assert options == {"blocks_per_chunk": 2, "backend": "xla", "data_shard": 1, "layerwise": True}


def test_pages_that_are_not_portable_are_warned_of_by_layer_and_reason(made, caplog):
    made.reasons = {"a": "its heads are split"}
    with caplog.at_level(logging.WARNING):
        made.spec.get_worker("caches")
    assert caplog.messages == ["pages of layer 'a' are not portable: its heads are split"]


def test_pages_of_another_size_are_named_with_the_remedy(made):
    made.record_bytes = 128
    with pytest.raises(
        CacheMismatchError, match=r"keep \[128\] .* say \[512\]; set page_size_bytes .* stores$"
    ):
        made.spec.get_worker("caches")


class AskedTransfer:
    """Notes who was waited for, and what was called off."""

    def __init__(self):
        self.waited, self.cancelled = [], []

    def warm_up(self, kv_caches, max_blocks):
        return (kv_caches, max_blocks, "warm")

    def ticket(self, name, error=None, *, cancelled=False):
        def wait():
            self.waited.append(name)
            return TransferResult(1, 0.5, error, cancelled)

        return SimpleNamespace(done=lambda: True, wait=wait, cancel=lambda: self.cancelled.append(name))


def test_worker_waits_for_the_jobs_it_is_asked_for_and_no_other():
    transfer = AskedTransfer()
    worker = HostOffloadingWorker(transfer, 1)
    assert worker.warm_up("caches", 7) == ("caches", 7, "warm")
    for job_id in range(2):
        worker._running[job_id] = _RunningJob(job_id, [transfer.ticket(job_id)])
    worker.wait([1, 5])
    assert transfer.waited == [1]


def test_reasons_of_a_job_that_failed_twice_are_told_both():
    transfer = AskedTransfer()
    worker = HostOffloadingWorker(transfer, 1)
    tickets = [transfer.ticket(0, "first"), transfer.ticket(1), transfer.ticket(2, "second")]
    worker._running[0] = _RunningJob(0, tickets)
    (result,) = worker.get_finished()
    assert (result.error, result.num_bytes, result.elapsed_s) == ("first; second", 3, 1.5)


CALLED_OFF = {"error": "called off", "cancelled": True}


@pytest.mark.parametrize(
    ("ends", "refused", "is_cancelled"),
    [
        ([{}], None, False),
        ([CALLED_OFF], None, True),
        ([{}, CALLED_OFF], None, True),
        ([{"error": "no disk"}, CALLED_OFF], None, False),
        ([CALLED_OFF], "no such block", False),
    ],
)
def test_job_was_called_off_if_some_of_it_was_and_nothing_went_wrong(ends, refused, is_cancelled):
    transfer = AskedTransfer()
    worker = HostOffloadingWorker(transfer, 1)
    tickets = [transfer.ticket(number, **end) for number, end in enumerate(ends)]
    worker._running[0] = _RunningJob(0, tickets, refused)
    (result,) = worker.get_finished()
    assert result.cancelled is is_cancelled


def test_every_group_of_the_jobs_named_is_called_off_and_of_no_other():
    transfer = AskedTransfer()
    worker = HostOffloadingWorker(transfer, 1)
    for job_id in range(3):
        worker._running[job_id] = _RunningJob(job_id, [transfer.ticket((job_id, group)) for group in "ab"])
    worker.cancel([5, 0, 2])
    assert transfer.cancelled == [(0, "a"), (0, "b"), (2, "a"), (2, "b")]
