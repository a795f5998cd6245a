"""Counters per group and reason, and histograms."""

from collections import Counter

import numpy as np
import pytest

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.histogram import Histogram
from jaxkv.connector.jobs import Job, JobKind
from jaxkv.connector.lookup import Deferral
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.store_plan import SkipReason
from jaxkv.keys import GroupId, KeyRun, KeyRuns, count_by_group, make_offload_key
from jaxkv.offload.base import DeviceBlocks, JobResult, LoadStoreSpec, ReqContext, TransferJob
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

CONFIG = KVCacheConfig(
    (
        KVCacheGroupSpec(("a", "b"), FullAttentionSpec(4, 1, 2, "float32"), 10),
        KVCacheGroupSpec(("c",), SlidingWindowSpec(4, 1, 2, "float32", 8), 10),
        KVCacheGroupSpec(("d",), MambaSpec(8, ((3,),), ("float32",)), 10),
    )
)
FULL_BYTES, WINDOW_BYTES = 128, 64
HASHES = [bytes([i]) * 16 for i in range(16)]
RUNS = KeyRuns([KeyRun(HASHES, 0, 0, 1, 3), KeyRun(HASHES, 1, 1, 1, 2)])


class Nowhere(LoadStoreSpec):
    pass


def make_job(kind, keys=RUNS, full=(0, -1, 2), window=(4, 5)):
    blocks = [DeviceBlocks(g, np.array(ids, np.int32)) for g, ids in enumerate((full, window))]
    return Job(kind, ReqContext("r"), keys, TransferJob(0, "r", blocks, Nowhere()))


@pytest.fixture
def metrics():
    return Metrics(ChunkedCaches(CONFIG, 1))


def test_groups_are_named_by_the_kind_of_their_layers(metrics):
    assert [g.kind for g in metrics.snapshot(None).groups] == ["full_attention", "sliding_window", "mamba"]


def test_runs_are_counted_without_making_their_keys():
    class Unreadable:
        def __getitem__(self, index):
            raise AssertionError("a key was made")

    runs = KeyRuns([KeyRun(Unreadable(), 0, 0, 1, 8192), KeyRun(Unreadable(), 2, 0, 1, 7)])
    assert list(count_by_group(runs)) == [(0, 8192), (2, 7)]
    assert list(count_by_group(runs.runs[0])) == [(0, 8192)]


def test_other_keys_are_counted_by_their_group_whatever_the_length_of_their_hash():
    keys = [make_offload_key(bytes(size), GroupId(group)) for size, group in ((16, 0), (32, 258), (16, 258))]
    assert sorted(count_by_group(keys)) == [(0, 1), (258, 2)]


@pytest.mark.parametrize("keys", [RUNS, tuple(RUNS)], ids=["runs", "keys"])
def test_a_store_counts_chunks_and_the_bytes_of_real_blocks_per_group(metrics, keys):
    metrics.job_ended(make_job(JobKind.STORE, keys), JobResult(0, 999, 0.5))
    stats = metrics.snapshot(None)
    assert [group.stored_chunks for group in stats.groups] == [3, 2, 0]
    assert [group.stored_bytes for group in stats.groups] == [2 * FULL_BYTES, 2 * WINDOW_BYTES, 0]
    assert (stats.store_seconds, stats.load_seconds, stats.loaded_bytes) == (0.5, 0.0, 0)
    assert (stats.store_sizes.num_values, stats.store_sizes.total) == (1, 2 * FULL_BYTES + 2 * WINDOW_BYTES)
    assert stats.load_sizes.num_values == 0


def test_what_jobs_moved_or_failed_to_move_adds_up(metrics):
    for kind in JobKind:
        for error in (None, "disk on fire") * 2:
            metrics.job_ended(make_job(kind), JobResult(0, 1, 0.5, error))
    stats = metrics.snapshot(None)
    full = stats.groups[0]
    assert (full.stored_chunks, full.failed_store_chunks) == (6, 6)
    assert (full.loaded_chunks, full.failed_load_chunks) == (6, 6)
    assert (full.stored_bytes, full.loaded_bytes) == (4 * FULL_BYTES, 4 * FULL_BYTES)
    assert (stats.store_seconds, stats.load_seconds) == (2.0, 2.0)


def test_a_failed_load_counts_its_chunks_and_its_time_but_no_bytes(metrics):
    metrics.job_ended(make_job(JobKind.LOAD), JobResult(0, 0, 0.25, "disk on fire"))
    stats = metrics.snapshot(None)
    assert [group.failed_load_chunks for group in stats.groups] == [3, 2, 0]
    assert [group.loaded_chunks for group in stats.groups] == [0, 0, 0]
    assert (stats.load_seconds, stats.loaded_bytes, stats.load_sizes.num_values) == (0.25, 0, 0)


def test_a_load_that_was_called_off_counts_its_time_alone(metrics):
    metrics.job_ended(make_job(JobKind.LOAD), JobResult(0, 0, 0.25, "called off", cancelled=True))
    stats = metrics.snapshot(None)
    assert stats.groups == Metrics(ChunkedCaches(CONFIG, 1)).snapshot(None).groups
    assert (stats.load_seconds, stats.load_sizes.num_values) == (0.25, 0)


def test_skips_are_counted_by_reason_and_in_bulk(metrics):
    metrics.skipped(GroupId(1), SkipReason.HELD, 8192)
    metrics.skipped(GroupId(1), SkipReason.HELD)
    metrics.skipped(GroupId(1), SkipReason.UNREACHABLE, 0)
    assert metrics.snapshot(None).groups[1].skipped_chunks == Counter({SkipReason.HELD: 8193})
    assert SkipReason.UNREACHABLE not in metrics.snapshot(None).groups[1].skipped_chunks


def test_hits_queries_evictions_deferrals_and_delays_are_counted(metrics):
    metrics.queried(100)
    metrics.hit(40, RUNS)
    metrics.evicted(list(RUNS))
    metrics.deferred(Deferral.PENDING)
    metrics.looked_up(0.002)
    metrics.waited(3.0)
    stats = metrics.snapshot("backend")
    assert (stats.queried_tokens, stats.hit_tokens, stats.backend) == (100, 40, "backend")
    assert [(group.hit_chunks, group.evicted_chunks) for group in stats.groups] == [(3, 3), (2, 2), (0, 0)]
    assert stats.deferred == {Deferral.PENDING: 1}
    assert stats.lookup_seconds.counts[stats.lookup_seconds.bounds.index(5e-3)] == 1
    assert stats.wait_seconds.counts[stats.wait_seconds.bounds.index(5.0)] == 1


def test_a_snapshot_does_not_change_with_the_counters(metrics):
    before = metrics.snapshot(None)
    metrics.skipped(GroupId(0), SkipReason.HELD)
    metrics.deferred(Deferral.RETRY)
    metrics.job_ended(make_job(JobKind.STORE), JobResult(0, 1, 1.0))
    assert before == Metrics(ChunkedCaches(CONFIG, 1)).snapshot(None)


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (2.1, 2), (1e9, 2)])
def test_a_value_at_a_bound_is_counted_below_it(value, bucket):
    histogram = Histogram((1, 2))
    for _ in range(2):
        histogram.observe(value)
    stats = histogram.snapshot()
    assert stats.counts == tuple(2 * (place == bucket) for place in range(3))
    assert (stats.total, stats.num_values) == (2 * value, 2)
