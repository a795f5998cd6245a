"""The loop with the real offloading connector: host hits, aborts, preemption, failures; nothing leaks."""

from __future__ import annotations

import os
import signal
from functools import partial

import jax
import numpy as np
import pytest
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.connector.lookup import Deferral
from jaxkv.errors import DeletedCacheError
from jaxkv.offload import LookupResult, OffloadingManager
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.serving import engine as serving_engine

pytestmark = pytest.mark.usefixtures("platform")

ALL = ("full", "window", "state")
KINDS = [("full",), ("full", "window"), ("window", "state"), ALL]
TIGHT = {"full": 31, "window": 14, "state": 4}


def make_engine(kinds=ALL, **options):
    model = ToyModel(kinds=kinds)
    config = make_config(model, 4, **TIGHT)
    connector = OffloadingConnector(OffloadingConfig(host_bytes="8MiB", **options), config)
    engine_config = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    return share_programs(LLMEngine(model, config, engine_config, connector))


def expect(engine, prompts, num_new=6, *, return_logits=False):
    kinds = tuple(group.layer_names[0].split(".")[0] for group in engine.cache_config.groups)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=num_new, return_logits=return_logits))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.output_ids == oracle_tokens(prompt, num_new, kinds)
    return outputs


def close(engine):
    engine.flush()
    assert engine.connector.leaks() == []
    assert all(pool.num_free == pool.num_blocks for pool in engine._cache.pools)
    engine.shutdown()
    engine.shutdown()


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_an_evicted_prompt_comes_back_from_the_host_up_to_its_last_whole_block(kinds):
    engine = make_engine(kinds)
    prompts = [random_prompt(seed, 101 + seed) for seed in range(4)]
    for prompt in prompts:
        expect(engine, [prompt])
    assert engine.stats.device_evictions > 0
    for prompt in prompts:
        metrics = expect(engine, [prompt])[0].metrics
        assert metrics.device_hit_tokens + metrics.host_hit_tokens == (len(prompt) - 1) // 4 * 4
        assert metrics.host_hit_tokens > 0
    close(engine)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_a_hit_from_the_host_gives_the_logits_of_the_same_hit_on_the_device(kinds):
    engine = make_engine(kinds)
    prompt = random_prompt(0, 60)
    expect(engine, [prompt])
    device = expect(engine, [prompt], return_logits=True)[0]
    engine.reset_prefix_cache()
    host = expect(engine, [prompt], return_logits=True)[0]
    assert device.metrics.device_hit_tokens == host.metrics.host_hit_tokens == 56
    np.testing.assert_array_equal(np.stack(device.logits), np.stack(host.logits))
    close(engine)


@pytest.mark.parametrize("offload_prompt_only", [True, False])
def test_preemption_and_loads_together_keep_the_tokens(offload_prompt_only):
    engine = make_engine(offload_prompt_only=offload_prompt_only)
    prompts = [random_prompt(seed, 30 + seed) for seed in range(6)]
    for _ in range(3):
        expect(engine, prompts, 40)
    assert engine.stats.num_preemptions > 0
    close(engine)


def test_generated_tokens_come_back_in_the_next_turn():
    engine = make_engine(offload_prompt_only=False)
    prompt = random_prompt(0, 30)
    answer = expect(engine, [prompt], 20)[0].output_ids
    engine.reset_prefix_cache()
    metrics = expect(engine, [[*prompt, *answer, 1, 2, 3]])[0].metrics
    assert metrics.host_hit_tokens == 48
    close(engine)


def test_an_abort_at_any_step_leaves_nothing_behind():
    engine = make_engine()
    prompts = [random_prompt(seed, 50) for seed in range(4)]
    expect(engine, prompts)
    for steps_before_abort in range(10):
        engine.reset_prefix_cache()
        ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=3)) for prompt in prompts]
        outputs = [output for _ in range(steps_before_abort) for output in engine.step()]
        engine.abort(ids[1])
        while engine.has_unfinished_requests:
            outputs += engine.step()
        done = {output.request_id: output.output_ids for output in outputs}
        for index in (0, 2, 3):
            assert done[ids[index]] == oracle_tokens(prompts[index], 3)
        engine.flush()
        assert engine.connector.leaks() == []
    close(engine)


def test_what_a_broken_step_did_not_compute_is_not_stored(monkeypatch):
    engine = make_engine()
    prompt = random_prompt(0, 60)
    original = engine._programs.fill
    monkeypatch.setattr(engine._programs, "fill", lambda *_: 1 / 0)
    engine.add_request(prompt, SamplingParams(max_new_tokens=1))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(engine._programs, "fill", original)
    while engine.has_unfinished_requests:
        engine.step()
    engine.flush()
    engine.reset_prefix_cache()
    # Whatever of the broken step had been stored would come back now, and change the tokens.
    assert expect(engine, [prompt])[0].metrics.host_hit_tokens == 56
    close(engine)


@pytest.mark.parametrize("lost", [False, True])
def test_a_step_that_fails_when_its_tokens_are_read_is_stored_only_if_its_caches_are_there(monkeypatch, lost):
    """The connector was told of the step while it ran."""
    engine = make_engine()
    prompt = random_prompt(0, 60)
    original = serving_engine._read_tokens

    def fail(running):
        original(running)
        for leaf in jax.tree.leaves(engine.kv_caches) if lost else ():
            leaf.delete()
        raise ZeroDivisionError

    engine.add_request(prompt, SamplingParams(max_new_tokens=1))
    engine.step()
    monkeypatch.setattr(serving_engine, "_read_tokens", fail)
    with pytest.raises(DeletedCacheError if lost else ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(serving_engine, "_read_tokens", original)
    engine.abort_all()
    engine.flush()
    engine.reset_prefix_cache()
    output = expect(engine, [prompt])[0]
    assert (output.metrics.host_hit_tokens > 0) != lost
    close(engine)


@pytest.mark.parametrize(
    "name",
    [
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "handle_preemptions",
        "start_load_kv",
        "wait_for_save",
        "get_transfer_results",
        "update_connector_output",
        "request_finished_all_groups",
    ],
)
def test_a_step_that_breaks_off_leaves_no_job_or_request_in_the_connector(name, monkeypatch):
    engine = make_engine(offload_prompt_only=False)
    prompts = [random_prompt(seed, 50) for seed in range(3)]
    expect(engine, prompts)
    original = getattr(engine.connector, name)
    for calls_before in range(3):
        engine.reset_prefix_cache()
        calls = iter([original] * calls_before + [lambda *_: 1 / 0])
        monkeypatch.setattr(engine.connector, name, lambda *args, c=calls: next(c, original)(*args))
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_new_tokens=3))
        outputs, failures = [], 0
        for _ in range(200):
            try:
                outputs += engine.step()
            except ZeroDivisionError:
                failures += 1
        assert failures == 1
        assert sorted(output.output_ids for output in outputs) == sorted(
            oracle_tokens(prompt, 3) for prompt in prompts
        )
        assert engine.connector.leaks() == []
    close(engine)


def test_a_backend_that_never_answers_a_lookup_costs_time_and_no_request(monkeypatch):
    monkeypatch.setattr("jaxkv.connector.loads.MAX_RETRY_S", 0.0)
    engine = make_engine()
    manager = engine.connector._spec.get_manager()
    prompt = random_prompt(0, 50)
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    monkeypatch.setattr(manager, "lookup", lambda *_: LookupResult.RETRY)
    for name in ("lookup_prefix", "lookup_suffix"):
        monkeypatch.setattr(manager, name, partial(getattr(OffloadingManager, name), manager))
    assert expect(engine, [prompt])[0].metrics.computed_tokens == 50
    assert engine.connector.get_stats().deferred[Deferral.RETRY] > 0
    close(engine)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_requests_with_the_same_prompt_load_it_once_and_share_it_on_the_device(kinds):
    engine = make_engine(kinds)
    prompt = random_prompt(0, 50)
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    alone = expect(engine, [prompt])[0].metrics
    loaded_bytes = engine.connector.get_stats().loaded_bytes
    assert alone.host_hit_tokens == 48
    engine.reset_prefix_cache()
    both = [output.metrics for output in expect(engine, [prompt, prompt])]
    assert engine.connector.get_stats().loaded_bytes == 2 * loaded_bytes
    assert sorted((m.device_hit_tokens, m.host_hit_tokens) for m in both) == [(0, 48), (48, 0)]
    close(engine)


@pytest.mark.parametrize("name", ["on_new_request", "request_finished_all_groups"])
def test_ctrl_c_while_requests_are_added_or_aborted_leaves_none_behind(monkeypatch, name):
    engine = make_engine()
    original = getattr(engine.connector, name)

    def interrupted(*args):
        monkeypatch.setattr(engine.connector, name, original)
        answer = original(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return answer

    monkeypatch.setattr(engine.connector, name, interrupted)
    monkeypatch.setattr(engine._programs, "fill", lambda *_: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([random_prompt(seed, 30) for seed in range(3)], SamplingParams())
    monkeypatch.undo()
    assert not engine.has_unfinished_requests
    close(engine)
