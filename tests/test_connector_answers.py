"""What single calls of the connector answer, where no loop would notice a wrong word."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from connector_loop import Loop, LoopRequest, hybrid_config
from loop_model import make_config, value_of

from jaxkv.connector import (
    KVConnectorBase,
    KVConnectorOutput,
    KVOutputAggregator,
    LoadFailure,
    OffloadingConfig,
    OffloadingConnector,
    SchedulerOutput,
)
from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.events import EventLog
from jaxkv.errors import ConfigError, RequestError
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.keys import KeyRun, KeyRuns
from jaxkv.offload import LookupResult, OffloadingEvent, PrefixLookup
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec

PROMPT = list(range(100, 150))


class SilentConnector(KVConnectorBase):
    pass


SilentConnector.__abstractmethods__ = frozenset()


def test_connector_that_does_nothing_keeps_no_block_and_asks_for_no_step():
    connector, request = SilentConnector(), LoopRequest("r", PROMPT)
    assert connector.register_finished_partial_tail(request, [[]], []) is False
    assert connector.has_pending_push_work() is False
    assert connector.has_pending_block_frees() is False
    assert connector.reset_cache() is True
    assert connector.get_external_cache_hit_sources(request, 8) == {"host": 8}
    assert connector.get_external_cache_hit_sources(request, 0) == {}


def test_missing_host_bytes_is_named_with_an_example():
    with pytest.raises(ConfigError, match=r"^the connector needs host_bytes, .* such as '1GiB'$"):
        OffloadingConfig.from_dict({})


def test_warm_up_hands_caches_and_sizes_on_and_answers_the_new_caches():
    loop = Loop()
    loop.worker.warm_up = lambda kv_caches, max_blocks: (kv_caches, max_blocks)
    assert loop.connector.warm_up(loop.caches, 7) == (loop.caches, 7)
    del loop.worker.warm_up
    loop.close()


# -- several workers --------------------------------------------------------------------------------------


def test_sends_and_receives_count_once_all_workers_have_named_them():
    aggregator = KVOutputAggregator(2)
    half = KVConnectorOutput(finished_sending={"sent"}, finished_recving={"received"})
    first = aggregator.aggregate([half, KVConnectorOutput()])
    assert (first.finished_sending, first.finished_recving) == (set(), set())
    second = aggregator.aggregate([KVConnectorOutput(), half])
    assert (second.finished_sending, second.finished_recving) == ({"sent"}, {"received"})
    assert aggregator.aggregate([KVConnectorOutput()] * 2) == KVConnectorOutput()


def test_failures_of_several_workers_are_one_with_all_their_blocks_and_reasons():
    aggregator = KVOutputAggregator(2)
    failures = [LoadFailure(((0, 4), (1, 5)), "disk"), LoadFailure(((1, 5), (1, 6)), "network")]
    outputs = [KVConnectorOutput(failed_recving={"r": failure}) for failure in failures]
    aggregated = aggregator.aggregate(outputs)
    joined = LoadFailure(((0, 4), (1, 5), (1, 6)), "disk; network")
    assert (aggregated.finished_recving, aggregated.failed_recving) == ({"r"}, {"r": joined})


# -- waiting ----------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when a test says so; a lookup takes half a second."""

    def __init__(self):
        self.now_s, self.lookups_s = 1000.0, 0.0

    def monotonic(self):
        return self.now_s

    def perf_counter(self):
        self.lookups_s += 0.5
        return self.lookups_s


@pytest.fixture
def waiting(monkeypatch):
    """A clock, what the backend answers at every lookup, and a question: what the host can supply."""
    clock, loop = Clock(), Loop(config=make_config({"full": 1}))
    monkeypatch.setattr("jaxkv.connector.loads.time", clock)
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    answers = SimpleNamespace(worst=LookupResult.RETRY)
    manager = loop.spec.get_manager()
    manager.lookup_prefix = lambda keys, ctx: PrefixLookup(len(keys), answers.worst)
    manager.lookup = lambda key, ctx: answers.worst

    def ask_at(now_s, worst):
        clock.now_s, answers.worst = 1000.0 + now_s, worst
        return loop.connector.get_num_new_matched_tokens(second, 0)[0]

    yield loop, ask_at
    del manager.lookup_prefix, manager.lookup
    loop.run()
    loop.close()


def test_backend_may_ask_for_ten_seconds_to_be_asked_again(waiting):
    _, ask_at = waiting
    assert ask_at(0, LookupResult.HIT_PENDING) is None
    assert ask_at(8, LookupResult.RETRY) is None
    assert ask_at(12, LookupResult.RETRY) is None
    assert ask_at(18, LookupResult.RETRY) is None
    assert ask_at(18.1, LookupResult.RETRY) == 0


def test_wait_of_a_request_counts_from_its_first_question_to_the_answer(waiting):
    loop, ask_at = waiting
    before = loop.connector.get_stats()
    for now_s in (1, 3, 4):
        assert ask_at(now_s, LookupResult.HIT_PENDING) is None
    assert ask_at(5, LookupResult.HIT) == 48
    assert ask_at(7, LookupResult.HIT) == 48
    after = loop.connector.get_stats()
    assert (after.wait_seconds.num_values, after.wait_seconds.total) == (1, 4.0)
    assert after.lookup_seconds.total - before.lookup_seconds.total == 5 * 0.5


# -- the end of a request ---------------------------------------------------------------------------------


def test_request_of_a_model_of_one_group_is_finished_with_its_one_table():
    config = make_config({"full": 1})
    spec = FakeOffloadingSpec(config, FakePool(1 << 16))
    connector = OffloadingConnector(OffloadingConfig(host_bytes=1), config, spec=spec)
    request = LoopRequest("r", PROMPT)
    connector.on_new_request(request)
    ended = []
    connector.request_finished_all_groups = lambda *arguments: ended.append(arguments) or (False, None)
    assert connector.request_finished(request, [1, 2]) == (False, None)
    assert ended == [(request, ([1, 2],))]
    del connector.request_finished_all_groups
    for _ in range(2):
        assert connector.request_finished(request, [1, 2]) == (False, None)
    connector.shutdown()


def test_shutdown_tells_the_backend_which_stores_landed_and_which_were_never_submitted():
    """It may keep chunks for longer than the connector lives."""
    loop = Loop(max_step_tokens=16)
    manager, ended = loop.spec.get_manager(), []
    complete = manager.complete_store
    manager.complete_store = lambda *arguments, success: ended.append(success) or complete(*arguments)
    loop.worker.delayed = True
    loop.add("first", PROMPT)
    loop.step()
    loop.step()
    assert len(loop.worker.job_ids) == 1
    assert len(loop.connector.build_connector_meta(SchedulerOutput()).stores) == 1
    loop.connector.shutdown()
    assert ended == [True, False]


def test_step_should_end_where_the_request_leaves_a_shared_prefix():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", [*PROMPT[:26], *[3] * 24])
    assert loop.connector.get_snapshot_boundaries(second) == (48,)
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (16, True)
    assert loop.connector.get_snapshot_boundaries(second) == (24, 48)
    assert loop.connector.get_snapshot_boundaries(LoopRequest("unknown", PROMPT)) == (48,)
    assert loop.connector.get_snapshot_boundaries(LoopRequest("short", PROMPT[:4])) == ()
    loop.run()
    loop.close()


# -- states that are handed over --------------------------------------------------------------------------

STATES_FIRST = {"state": 1, "full": 1}


def hand_over(loop, request, boundary):
    """Offer the state of ``boundary`` from a block of its own, and let the request go on."""
    block = loop.free[0].pop()
    loop.caches["state.0"][block] = [value_of(tuple(request.tokens[:boundary])), boundary]
    answer = loop.connector.register_finished_partial_tail(request, request.tables, [(0, block, boundary)])
    loop.abort(request)
    loop.run()
    loop.free[0].append(block)
    return answer


@pytest.mark.parametrize("boundary", [0, -4, 6])
def test_state_at_no_boundary_is_refused(boundary):
    loop = Loop(config=make_config(STATES_FIRST))
    first = loop.add("first", PROMPT)
    loop.step()
    match = f"handed over at {boundary} tokens; boundaries are multiples of 4"
    with pytest.raises(RequestError, match=match):
        loop.connector.register_finished_partial_tail(first, first.tables, [(0, 0, boundary)])
    loop.run()
    loop.close()


@pytest.mark.parametrize(("limit", "hits"), [(None, [12]), (12, [12]), (11, [8])])
def test_tail_with_a_handed_state_is_stored_up_to_the_limit_and_no_further(limit, hits):
    loop = Loop(config=make_config(STATES_FIRST), offload_prompt_only=False)
    params = {} if limit is None else {"max_offload_tokens": limit}
    first = loop.add("first", PROMPT[:6], 20, kv_transfer_params=params)
    while first.num_computed_tokens < 14:
        loop.step()
    assert hand_over(loop, first, 12) is False
    assert loop.serve("second", first.tokens[:13]).host_hits == hits
    loop.close()


def test_state_is_handed_over_at_the_first_link_where_a_link_is_one_token():
    loop = Loop(config=make_config(STATES_FIRST, tokens_per_hash=1), max_step_tokens=14)
    first = loop.add("first", PROMPT[:14], 9)
    loop.step()
    hand_over(loop, first, 1)
    loop.close()


# -- events -----------------------------------------------------------------------------------------------


def told(log, request, keys):
    """What the log tells when a job stored ``keys``."""
    log.store_started(1, request, keys)
    log.store_ended(1, success=True)
    return log.take(
        SimpleNamespace(take_events=lambda: [OffloadingEvent(tuple(keys), "host", removed=False)])
    )


@dataclass
class RequestOfVllm:
    """Shows its tokens as vLLM's requests do."""

    all_token_ids: list[int]
    token_ids: list[int]
    block_hashes: list[bytes]


def test_tail_of_one_token_is_told_with_that_token_alone():
    caches = ChunkedCaches(make_config({"state": 1}, tokens_per_hash=1), 1)
    log = EventLog(caches, enabled=True, self_describing=True)
    request = LoopRequest("r", PROMPT, chain=HashChain(ChainRoot("m", 1)))
    keys = KeyRuns([KeyRun(request.block_hashes, 0, 8, 8, 1)])
    (event,) = told(log, request, keys)
    assert (event.block_size, event.token_ids) == (1, (PROMPT[8],))
    assert event.parent_block_hash == request.block_hashes[7]


def test_tokens_of_an_event_are_those_of_all_token_ids_where_a_request_has_them():
    log = EventLog(ChunkedCaches(hybrid_config(), 1), enabled=True, self_describing=True)
    hashes = LoopRequest("r", PROMPT).block_hashes
    request = RequestOfVllm(PROMPT, [0] * len(PROMPT), hashes)
    keys = KeyRuns([KeyRun(request.block_hashes, 0, 1, 1, 2)])

    (event,) = told(log, request, keys)
    assert event.token_ids == tuple(PROMPT[4:12])
