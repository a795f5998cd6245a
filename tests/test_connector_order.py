"""The order in which loops call the connector, vLLM's own among them, and every call with nothing to do."""

import random

import pytest
from connector_loop import Loop, LoopRequest, expected_output, hybrid_config, make_caches
from draft_loop import DraftLoop
from loop_model import make_config
from loop_tools import forget, held

from jaxkv.connector import (
    KVConnectorOutput,
    OffloadingConfig,
    OffloadingConnector,
    SchedulerOutput,
)
from jaxkv.serving.no_connector import NoConnector
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec

PROMPT = list(range(100, 150))


def make_idle_connector():
    config = hybrid_config()
    spec = FakeOffloadingSpec(config, FakePool(1 << 16))
    return OffloadingConnector(OffloadingConfig(host_bytes=1, enable_events=True), config, spec=spec)


@pytest.mark.parametrize("make", [make_idle_connector, NoConnector])
def test_every_call_of_an_idle_connector_answers_that_there_is_nothing(make):
    connector, caches = make(), make_caches(hybrid_config())
    stranger = LoopRequest("stranger", PROMPT[:20])
    connector.register_kv_caches(caches)
    assert connector.warm_up(caches, 8) is caches
    assert connector.snapshot_interval_tokens in (1, 8)
    assert isinstance(connector.layout_fingerprint, str)
    for _ in range(2):
        metadata = connector.build_connector_meta(SchedulerOutput())
        assert connector.handle_preemptions(caches, metadata) is caches
        connector.bind_connector_metadata(metadata)
        assert connector.start_load_kv(caches) is caches
        assert connector.wait_for_layer_load("full.0") is None
        assert connector.save_kv_layer("full.0", caches["full.0"]) is None
        assert connector.wait_for_save(caches) is caches
        assert connector.get_finished(set()) == (set(), set())
        assert connector.get_transfer_results({"stranger"}) == KVConnectorOutput()
        assert connector.build_connector_worker_meta() is None
        connector.clear_connector_metadata()
        connector.clear_connector_metadata()
        connector.update_connector_output(KVConnectorOutput())
    assert connector.request_finished(stranger, []) == (False, None)
    assert connector.request_finished_all_groups(stranger, [[], [], []]) == (False, None)
    assert connector.register_finished_partial_tail(stranger, [[], [], []], []) is False
    assert connector.get_loaded_kv_cache_group_ids(stranger) == ()
    assert connector.get_external_cache_hit_sources(stranger, 0) == {}
    assert connector.get_external_cache_hit_sources(stranger, 16) == {"host": 16}
    assert not connector.has_pending_push_work()
    assert not connector.has_pending_block_frees()
    assert tuple(connector.take_events()) == ()
    assert connector.reset_cache() is True
    connector.shutdown()
    connector.shutdown()


def test_an_idle_connector_has_counted_nothing_and_holds_nothing():
    connector = make_idle_connector()
    stats = connector.get_stats()
    assert (stats.hit_tokens, stats.queried_tokens, stats.stored_bytes, stats.loaded_bytes) == (0, 0, 0, 0)
    assert (stats.deferred, stats.evicted_chunks, stats.backend.num_chunks) == ({}, 0, 0)
    assert connector.leaks() == []
    connector.shutdown()


@pytest.mark.parametrize("make", [make_idle_connector, NoConnector])
def test_a_request_that_no_cache_can_help_gets_nothing_and_leaves_nothing(make):
    connector = make()
    request = LoopRequest("first", PROMPT[:20])
    connector.on_new_request(request)
    connector.on_new_request(LoopRequest("second", PROMPT[:1]))
    for _ in range(2):
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.get_num_new_matched_tokens(request, 16) == (0, False)
    connector.update_state_after_alloc(request, [[], [], []], 0)
    connector.update_state_after_alloc(request, [[], [], []], 0)
    assert connector.request_finished_all_groups(request, [[], [], []]) == (False, None)
    assert connector.request_finished_all_groups(request, [[], [], []]) == (False, None)
    for name in ("second", "nobody"):
        assert connector.request_finished(LoopRequest(name, PROMPT[:1]), []) == (False, None)
    connector.build_connector_meta(SchedulerOutput(finished_req_ids={"first", "second", "nobody"}))
    connector.update_connector_output(KVConnectorOutput())
    assert not connector.has_pending_push_work()
    connector.shutdown()


@pytest.mark.parametrize("prompt_tokens", [24, 25, 27, 28])
@pytest.mark.parametrize("finishes_first", [False, True])
def test_the_last_step_of_a_request_is_stored_whoever_hears_of_its_end_first(finishes_first, prompt_tokens):
    """vLLM's scheduler ends requests while it takes in a step; the connector hears of the step after that."""
    loop = Loop(max_step_tokens=64)
    loop.finishes_first = finishes_first
    first = loop.serve("first", PROMPT[:prompt_tokens])
    assert held(loop, first, 0) == set(range(4, prompt_tokens + 1, 4))
    assert loop.serve("second", PROMPT[:29]).host_hits == [24]
    loop.close()


@pytest.mark.parametrize("lengths", [(6, 41), (41, 6)])
@pytest.mark.parametrize("finishes_first", [False, True])
def test_a_request_that_ends_in_a_step_costs_no_other_the_state_of_that_step(finishes_first, lengths):
    loop = Loop(max_step_tokens=8)
    loop.finishes_first = finishes_first
    requests = {length: loop.add(f"{length}", [length, *PROMPT[:length]]) for length in lengths}
    loop.run()
    assert held(loop, requests[41], 2) == {8, 16, 24, 32, 40}
    loop.close()


@pytest.mark.parametrize("accepted", [0, 2])
@pytest.mark.parametrize("finishes_first", [False, True])
def test_rejected_tokens_of_the_last_step_are_not_stored_whoever_hears_of_its_end_first(
    finishes_first, accepted
):
    loop = DraftLoop(
        config=make_config({"full": 1, "window": 1}), offload_prompt_only=False, accept=lambda: accepted
    )
    loop.finishes_first = finishes_first
    first = loop.serve("first", PROMPT[:9], 16)
    assert held(loop, first, 0) == {4, 8, 12, 16, 20, 24}
    tokens = [*PROMPT[:9], *loop.outputs["first"], 1]
    assert loop.serve("second", tokens, 4).host_hits == [24]
    assert loop.outputs["second"] == expected_output(tokens, 4)
    loop.close()


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_right_in_the_order_of_vllms_loop_however_slow_jobs_are(seed):
    draw = random.Random(seed)
    loop = Loop(num_blocks=24, pool_bytes=1 << 16, offload_prompt_only=False)
    loop.finishes_first = loop.worker.delayed = True
    prompts = {f"r{index}": [*PROMPT[: draw.randrange(1, 45)], index] for index in range(10)}
    for name, prompt in prompts.items():
        loop.add(name, prompt, draw.randrange(1, 12))
    for _ in range(600):
        loop.step()
        loop.worker.finish(draw.sample(loop.worker.job_ids, draw.randrange(len(loop.worker.job_ids) + 1)))
        if not loop.busy:
            break
    for name, prompt in prompts.items():
        assert loop.outputs[name] == expected_output(prompt, len(loop.outputs[name]))
    loop.close()


def test_a_request_aborted_while_its_step_runs_stores_nothing_of_that_step():
    """The loop hears of the abort between planning and output: the step's tokens may never be computed."""
    loop = Loop(max_step_tokens=8)
    first = loop.add("first", PROMPT[:40], 5)
    loop.step()
    loop.step()
    compute = loop.compute
    loop.compute = lambda output: loop.abort(first)
    loop.step()
    loop.compute = compute
    loop.run()
    assert held(loop, first, 0) == {4, 8, 12, 16}
    loop.close()


def test_a_loop_that_asks_for_finished_requests_in_vllms_way_gets_the_same():
    loop = Loop()
    loop.serve("first", PROMPT)

    def work(metadata, output):
        caches = loop.connector.handle_preemptions(loop.caches, metadata)
        loop.connector.bind_connector_metadata(metadata)
        loop.connector.start_load_kv(caches)
        loop.compute(output)
        sent, received = loop.connector.get_finished(output.finished_req_ids)
        meta = loop.connector.build_connector_worker_meta()
        loop.connector.clear_connector_metadata()
        return KVConnectorOutput(finished_sending=sent, finished_recving=received, worker_meta=meta)

    loop.work = work
    second = loop.serve("second", PROMPT, 3)
    assert second.host_hits == [48]
    assert loop.outputs["second"] == expected_output(PROMPT, 3)
    loop.close()


def test_a_promise_that_is_declined_is_computed_and_stored_as_if_it_had_not_been_made():
    loop = Loop(max_step_tokens=64)
    first = loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT, 2)
    ask = loop.connector.get_num_new_matched_tokens

    def decline(request, known):
        assert ask(request, known) == (48, True)
        forget(loop, first, 0, [])
        return 0, False

    loop.connector.get_num_new_matched_tokens = decline
    loop.run()
    assert second.host_hits == []
    assert loop.outputs["second"] == expected_output(PROMPT, 2)
    assert loop.connector.get_stats().groups[0].skipped_chunks
    loop.close()


def test_asking_again_answers_the_same_and_pins_once():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    for _ in range(3):
        assert loop.connector.get_num_new_matched_tokens(second, 0) == (48, True)
    assert all("has 1 uses" in leak for leak in loop.connector.leaks() if "chunk " in leak)
    assert loop.connector.get_num_new_matched_tokens(second, 16) == (32, True)
    loop.run()
    assert second.host_hits == [48]
    loop.close()
