"""Small parts of the connector, each with the exact answer that a change of one sign or word would spoil."""

import numpy as np
import pytest
from connector_loop import BLOCK, Loop, hybrid_config
from loop_model import make_config

from jaxkv.connector import OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import JobKind, JobTable
from jaxkv.connector.metadata import OffloadingConnectorMetadata
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.spans import PlannedSpan, block_ids, shrinking_prefixes, tail_span, whole_span
from jaxkv.connector.store_plan import SkipReason
from jaxkv.connector.worker import OffloadingConnectorWorker
from jaxkv.errors import ConfigError, RequestError
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.keys import GroupId, KeyRun, KeyRuns
from jaxkv.offload import ReqContext
from jaxkv.offload.base import DeviceBlocks, JobResult, LoadStoreSpec, OffloadingSpec, TransferJob
from jaxkv.offload.factory import make_offloading_spec
from jaxkv.offload.options import BackendOptions
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

PROMPT = list(range(100, 150))
FULL, STATE = GroupId(0), GroupId(2)
CTX = ReqContext("r")


def hashes_of(num_tokens, tokens_per_hash=BLOCK):
    return HashChain(ChainRoot("m", tokens_per_hash), token_ids=list(range(num_tokens))).block_hashes


# -- worker side ------------------------------------------------------------------------------------------


class Nowhere(LoadStoreSpec):
    pass


class FailingWorker:
    def __init__(self):
        self.submitted = []

    def submit_load(self, job, kv_caches):
        self.submitted.append(job.job_id)
        return kv_caches

    def get_finished(self):
        taken, self.submitted = self.submitted, []
        return [JobResult(job_id, 0, 0.0, "the medium is gone") for job_id in taken]


def test_failed_load_names_every_block_it_was_for_block_0_included_and_no_hole():
    worker = OffloadingConnectorWorker(FailingWorker())
    blocks = [DeviceBlocks(GroupId(1), np.array([0, -1, 5], np.int32))]
    job = TransferJob(0, "r", blocks, Nowhere())
    worker.submit_loads(OffloadingConnectorMetadata(loads=(job,)), {})
    assert worker.take_received() == set()
    assert worker.take_failed()["r"].blocks == ((1, 0), (1, 5))


def test_shutdown_waits_for_jobs_that_have_not_ended_and_for_no_other():
    backend, waited_for = FailingWorker(), []
    backend.wait = waited_for.append
    worker = OffloadingConnectorWorker(backend)
    jobs = [TransferJob(number, "r", [], Nowhere()) for number in range(2)]
    worker.submit_loads(OffloadingConnectorMetadata(loads=(jobs[0],)), {})
    assert worker.take_received() == set()
    worker.submit_loads(OffloadingConnectorMetadata(loads=(jobs[1],)), {})
    worker.drain()
    assert waited_for == [(1,)]
    assert [result.job_id for result in worker.take_results()] == [0, 1]


class FullWorker:
    """Takes one job at a time; the next is an error until ``has_room`` is set."""

    def __init__(self):
        self.submitted, self.has_room, self.cancelled = [], True, []

    def cancel(self, job_ids):
        self.cancelled += job_ids

    def submit_load(self, job, kv_caches):
        if not self.has_room:
            raise MemoryError
        self.has_room = False
        self.submitted.append(job.job_id)
        return kv_caches

    submit_store = submit_load


@pytest.mark.parametrize("kind", ["stores", "loads"])
def test_each_job_is_submitted_once_though_a_step_breaks_off_between_two_of_them(kind):
    backend = FullWorker()
    worker = OffloadingConnectorWorker(backend)
    jobs = tuple(TransferJob(number, "r", [], Nowhere()) for number in range(3))
    submit, metadata = getattr(worker, f"submit_{kind}"), OffloadingConnectorMetadata(**{kind: jobs})
    for _ in jobs[:2]:
        backend.has_room = True
        with pytest.raises(MemoryError):
            submit(metadata, {})
    for _ in range(2):
        backend.has_room = True
        submit(metadata, {})
    assert backend.submitted == [0, 1, 2]


def test_loads_that_nobody_waits_for_are_called_off_before_anything_is_submitted():
    backend = FullWorker()
    backend.has_room = False
    metadata = OffloadingConnectorMetadata((TransferJob(9, "r", [], Nowhere()),), cancelled=(3, 4))
    with pytest.raises(MemoryError):
        OffloadingConnectorWorker(backend).submit_stores(metadata, {})
    assert backend.cancelled == [3, 4]


FINE, FAILED = JobResult(0, 1, 1.0), JobResult(0, 0, 1.0, "no disk")
CALLED_OFF = JobResult(0, 0, 1.0, "called off", cancelled=True)


@pytest.mark.parametrize(
    ("reports", "is_cancelled"),
    [
        ([FINE, FINE], False),
        ([FINE, CALLED_OFF], True),
        ([CALLED_OFF, FINE], True),
        ([CALLED_OFF, CALLED_OFF], True),
        ([CALLED_OFF, FAILED], False),
        ([FAILED, CALLED_OFF], False),
        ([FAILED, FINE], False),
    ],
)
def test_job_of_several_workers_was_called_off_if_one_called_it_off_and_none_failed(reports, is_cancelled):
    table = JobTable(2)
    table.start(JobKind.LOAD, CTX, [], [], Nowhere())
    assert table.report(reports[0]) is None
    _, result = table.report(reports[1])
    assert result.cancelled is is_cancelled
    assert (result.error is None) == (reports == [FINE, FINE])


# -- spans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end_tokens", "chunk"), [(9, 1), (15, 1), (17, 2)])
def test_tail_is_the_chunk_of_its_last_token(end_tokens, chunk):
    config = make_config({"full": 1, "state": 1}, tokens_per_hash=1)
    span = tail_span(ChunkedCaches(config, 1), hashes_of(20, 1), GroupId(1), end_tokens)
    assert (span.chunks, span.keys.hashes) == (range(chunk, chunk + 1), range(end_tokens - 1, end_tokens))


def test_shrinking_prefix_keeps_spans_that_end_before_it_whole():
    caches = ChunkedCaches(hybrid_config(), 1)
    tables = {FULL: list(range(8)), STATE: [9]}
    spans = [
        whole_span(caches, hashes_of(32), FULL, range(8)),
        whole_span(caches, hashes_of(32), STATE, range(1)),
    ]
    planned = [PlannedSpan(span, block_ids(caches, span, tables[span.group])) for span in spans]
    _, half, *_ = shrinking_prefixes(caches, planned)
    assert [(part.span.group, part.span.chunks) for part in half] == [(FULL, range(4)), (STATE, range(1))]
    assert [part.block_ids.tolist() for part in half] == [[0, 1, 2, 3], [9]]


def test_chunks_of_one_token_end_one_after_another():
    config = KVCacheConfig((KVCacheGroupSpec(("a",), FullAttentionSpec(1, 1, 1, np.int64), 9),))
    caches = ChunkedCaches(config, 1)
    span = whole_span(caches, hashes_of(3, 1), FULL, range(3))
    prefixes = shrinking_prefixes(caches, [PlannedSpan(span, np.arange(3, dtype=np.int32))])
    assert [sum(len(part.span) for part in parts) for parts in prefixes] == [3, 1]


# -- loads ------------------------------------------------------------------------------------------------


def test_block_that_the_device_holds_is_not_loaded_into_where_its_chunk_is():
    """A device hit of 20 tokens ends inside a chunk of two blocks: the first is others' as well."""
    loop = Loop(config=make_config({"full": 1}), blocks_per_chunk=2)
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    loop.waiting.remove(second)
    assert loop.connector.get_num_new_matched_tokens(second, 20) == (28, True)
    loop.connector.update_state_after_alloc(second, [list(range(12))], 28)
    (job,) = loop.connector.build_connector_meta(SchedulerOutput()).loads
    assert [blocks.block_ids.tolist() for blocks in job.blocks] == [[-1, *range(5, 12)]]
    assert loop.connector.get_stats().queried_tokens == 50 + 30
    loop.connector.shutdown()


def test_only_the_number_of_tokens_that_was_promised_can_be_loaded():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    promised, _ = loop.connector.get_num_new_matched_tokens(second, 0)
    tables = [list(range(group.num_blocks)) for group in loop.config.groups]
    with pytest.raises(RequestError, match=f"promised {promised} tokens"):
        loop.connector.update_state_after_alloc(second, tables, promised - 8)
    loop.run()
    loop.close()


# -- stores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_chunks_the_backend_holds_are_left_out_of_the_job_and_counted(blocks_per_chunk):
    loop = Loop(blocks_per_chunk=blocks_per_chunk, max_step_tokens=32)
    manager, metadata = loop.spec.get_manager(), []
    request = loop.add("first", PROMPT)
    held = ChunkedCaches(loop.config, blocks_per_chunk).keys(request.block_hashes, FULL, range(1, 2))
    assert manager.prepare_store(held, CTX) is not None
    manager.complete_store(held, CTX)
    build = loop.connector.build_connector_meta
    loop.connector.build_connector_meta = lambda output: metadata.append(build(output)) or metadata[-1]
    loop.step()
    table = request.tables[FULL][: 32 // BLOCK]
    loop.step()
    (job,) = metadata[1].stores
    stored = {blocks.group: blocks.block_ids.tolist() for blocks in job.blocks}
    assert stored[FULL] == table[:blocks_per_chunk] + table[2 * blocks_per_chunk :]
    skipped = loop.connector.get_stats().groups[FULL].skipped_chunks
    assert skipped == {SkipReason.HELD: 1}
    assert loop.connector.get_stats().groups[1].skipped_chunks[SkipReason.HELD] == 0
    loop.run()
    loop.close()


# -- counters ---------------------------------------------------------------------------------------------


def test_queries_hits_and_evictions_add_up():
    metrics = Metrics(ChunkedCaches(hybrid_config(), 1))
    runs = KeyRuns([KeyRun(hashes_of(16), FULL, 0, 1, 3)])
    for _ in range(2):
        metrics.queried(20)
        metrics.hit(12, runs)
        metrics.evicted(runs)
    stats = metrics.snapshot(None)
    assert stats.queried_tokens == 40
    assert (stats.hit_tokens, stats.groups[0].hit_chunks, stats.groups[0].evicted_chunks) == (24, 6, 6)


# -- backends ---------------------------------------------------------------------------------------------


class Told(OffloadingSpec):
    """Remembers what it was made from, and goes no further."""

    options: BackendOptions

    def __init__(self, options):
        type(self).options = options
        raise InterruptedError

    get_manager = get_worker = shutdown = None


def test_backend_is_told_every_option_of_the_config():
    options = {
        "host_bytes": 1 << 20,
        "blocks_per_chunk": 2,
        "eviction_policy": "arc",
        "store_threshold": 3,
        "transfer_backend": "xla",
        "portable_pages": True,
        "data_shard": 1,
        "layerwise_loads": True,
        "enable_events": True,
    }
    config = OffloadingConfig(backend=f"{__name__}.Told", backend_options={"path": "/mnt"}, **options)
    hints, caches = {"full.0": None}, hybrid_config()
    with pytest.raises(InterruptedError):
        OffloadingConnector(config, caches, hints=hints)
    told = Told.options
    assert {name: getattr(told, name) for name in options} == options
    assert (told.extra, told.hints, told.kv_cache_config) == ({"path": "/mnt"}, hints, caches)


class Impostor(OffloadingSpec):
    def __new__(cls, options):
        return options

    get_manager = get_worker = shutdown = None


def test_backend_that_makes_something_else_is_named():
    options = BackendOptions(hybrid_config(), 1)
    with pytest.raises(ConfigError, match=r"Impostor' made BackendOptions.*no OffloadingSpec"):
        make_offloading_spec(f"{__name__}.Impostor", options)
