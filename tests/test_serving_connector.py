"""The loop with a connector: order of calls, host hits, delays, failures and aborts while loading."""

from __future__ import annotations

import pytest
from serving_fake_connector import STEP, FakeConnector
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.serving import EngineConfig, LLMEngine, RequestStatus, SamplingParams

ALL = ("full", "window", "state")
KINDS = [("full",), ("full", "window"), ALL]
TIGHT = {"full": 30, "window": 14, "state": 4}


def make_engine(kinds=ALL, *, blocks=None, options=None, **fake):
    model = ToyModel(kinds=kinds)
    config = make_config(model, 4, **(TIGHT | (blocks or {})))
    connector = FakeConnector(config, **fake)
    config_options = EngineConfig(**({"prefill_shapes": (8, 32), "max_num_seqs": 3} | (options or {})))
    engine = share_programs(LLMEngine(model, config, config_options, connector))
    return engine, connector


def expect(engine, prompts, num_new=6):
    kinds = tuple(group.layer_names[0].split(".")[0] for group in engine.cache_config.groups)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=num_new))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.output_ids == oracle_tokens(prompt, num_new, kinds)
        metrics = output.metrics
        counts = (metrics.device_hit_tokens, metrics.host_hit_tokens, metrics.computed_tokens)
        assert sum(counts) == len(prompt)
    return [output.metrics for output in outputs]


def assert_all_blocks_are_free(engine):
    for pool in engine._cache.pools:
        assert pool.num_free == pool.num_blocks
    assert not engine._scheduler.has_loose_ends


@pytest.mark.parametrize("load_steps", [None, 0, 3])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_an_evicted_prompt_comes_back_from_the_host(kinds, load_steps):
    engine, connector = make_engine(kinds, load_steps=load_steps)
    prompts = [random_prompt(seed, 70 + seed) for seed in range(4)]
    expect(engine, prompts)
    engine.reset_prefix_cache()
    for prompt in prompts:
        metrics = expect(engine, [prompt])[0]
        assert metrics.device_hit_tokens + metrics.host_hit_tokens == (len(prompt) - 1) // 4 * 4
        assert metrics.host_hit_tokens > 0
    assert connector.loaded_pages > 0
    assert_all_blocks_are_free(engine)


def test_every_step_calls_the_connector_in_the_documented_order():
    engine, connector = make_engine()
    expect(engine, [random_prompt(0, 30)])
    steps = [connector.calls[i : i + len(STEP)] for i in range(0, len(connector.calls), len(STEP))]
    assert steps
    assert all(step == STEP for step in steps)


@pytest.mark.parametrize("load_steps", [None, 0, 2])
def test_preemption_and_loads_together_keep_the_tokens(load_steps):
    engine, _ = make_engine(load_steps=load_steps)
    prompts = [random_prompt(seed, 30 + seed) for seed in range(6)]
    for _ in range(3):
        expect(engine, prompts, 30)
    assert engine.stats.num_preemptions > 0
    assert_all_blocks_are_free(engine)


def test_a_device_hit_is_continued_from_the_host():
    engine, _ = make_engine(("full",))
    prompt = random_prompt(0, 80)
    expect(engine, [prompt])
    # Whoever comes next takes the tail first, so the head of the prompt stays on the device.
    expect(engine, [random_prompt(1, 40)])
    metrics = expect(engine, [prompt])[0]
    assert metrics.device_hit_tokens > 0
    assert metrics.host_hit_tokens > 0
    assert metrics.computed_tokens == 4


def test_a_hesitating_connector_does_not_block_the_requests_behind():
    engine, _ = make_engine(("full",), hesitate=1)
    slow = engine.add_request(random_prompt(0, 8), SamplingParams(max_new_tokens=1))
    fast = engine.add_request(random_prompt(1, 8), SamplingParams(max_new_tokens=1))
    assert [output.request_id for output in engine.step()] == [fast]
    assert [output.request_id for output in engine.step()] == [slow]


@pytest.mark.parametrize("load_steps", [None, 0, 2])
def test_a_failed_load_is_recomputed_and_counted_as_computed(load_steps):
    engine, connector = make_engine(load_steps=load_steps)
    prompt = random_prompt(0, 60)
    expect(engine, [prompt])
    connector.host.clear()
    engine.reset_prefix_cache()
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    connector.fail_loads = 1
    retried = expect(engine, [prompt])[0]
    assert retried.host_hit_tokens == 56  # the second try loads
    assert_all_blocks_are_free(engine)


def test_blocks_of_a_request_aborted_while_loading_are_kept_until_the_load_ended():
    engine, connector = make_engine(load_steps=3)
    prompt = random_prompt(0, 60)
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    request_id = engine.add_request(prompt, SamplingParams(max_new_tokens=2))
    engine.step()
    output = engine.abort(request_id)
    assert output.status is RequestStatus.ABORTED
    assert not engine.has_unfinished_requests
    assert all(pool.num_free < pool.num_blocks for pool in engine._cache.pools)
    other = random_prompt(1, 60)
    expect(engine, [other])
    engine.flush()
    assert_all_blocks_are_free(engine)
    assert connector.loaded_pages > 0


@pytest.mark.parametrize("steps_before_abort", range(7))
def test_an_abort_at_any_step_of_a_load_leaves_nothing_behind(steps_before_abort):
    engine, _ = make_engine(load_steps=2)
    prompts = [random_prompt(seed, 50) for seed in range(3)]
    expect(engine, prompts)
    engine.reset_prefix_cache()
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=3)) for prompt in prompts]
    outputs = [output for _ in range(steps_before_abort) for output in engine.step()]
    engine.abort(ids[1])
    while engine.has_unfinished_requests:
        outputs += engine.step()
    done = {output.request_id: output.output_ids for output in outputs}
    for index in (0, 2):
        assert done[ids[index]] == oracle_tokens(prompts[index], 3)
    engine.shutdown()
    assert_all_blocks_are_free(engine)


def test_loaded_blocks_are_not_findable_before_the_load_has_landed():
    engine, _ = make_engine(load_steps=4)
    prompt = random_prompt(0, 60)
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    engine.add_request(prompt, SamplingParams(max_new_tokens=2))
    engine.step()
    assert all(pool.num_cached == 0 for pool in engine._cache.pools)
    while engine.has_unfinished_requests:
        engine.step()
    assert all(pool.num_cached > 0 for pool in engine._cache.pools)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_a_loaded_request_may_go_on_with_a_smaller_chunk_than_was_planned(kinds):
    options = {"prefill_budget": 40, "max_num_seqs": 2}
    engine, connector = make_engine(kinds, load_steps=1, options=options, blocks={"full": 80, "window": 40})
    prompt, other = [*random_prompt(0, 44), *random_prompt(1, 40)], random_prompt(2, 100)
    expect(engine, [prompt[:44]])
    engine.reset_prefix_cache()
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=6))]
    engine.step()
    # Admitted with room for a chunk of 32 tokens; by the time it has landed the other one leaves it 8.
    ids.append(engine.add_request(other, SamplingParams(max_new_tokens=6)))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    done = {output.request_id: output.output_ids for output in outputs}
    assert done == {
        key: oracle_tokens(tokens, 6, kinds) for key, tokens in zip(ids, (prompt, other), strict=True)
    }
    engine.flush()
    assert connector.loaded_pages > 0
    assert_all_blocks_are_free(engine)


def test_a_running_request_short_of_blocks_waits_for_a_load_and_is_not_preempted_for_it():
    kinds = ("full", "state")
    engine, _ = make_engine(kinds, load_steps=6, blocks={"full": 60, "state": 3})
    elder, younger = random_prompt(0, 30), random_prompt(1, 30)
    expect(engine, [elder, younger])
    engine.reset_prefix_cache()
    params = SamplingParams(max_new_tokens=12)
    ids = [engine.add_request(elder, params)]
    while engine.stats.num_steps < 1000 and not engine._scheduler._running:
        engine.step()
    ids.append(engine.add_request(younger, params))
    preempted, outputs = [], []
    while engine.has_unfinished_requests:
        outputs += engine.step()
        preempted += [request.request_id for request in engine._scheduler._waiting]
        assert engine.stats.num_steps < 1000, "two requests keep taking each other's blocks"
    assert set(preempted) == {ids[1]}
    assert [output.request_id for output in outputs] == ids
    assert [output.output_ids for output in outputs] == [
        oracle_tokens(prompt, 12, kinds) for prompt in (elder, younger)
    ]
    engine.flush()
    assert_all_blocks_are_free(engine)


@pytest.mark.parametrize("fail_loads", [0, 1])
def test_results_of_transfers_may_be_taken_twice(monkeypatch, fail_loads):
    engine, connector = make_engine(load_steps=1)
    prompts = [random_prompt(seed, 50) for seed in range(2)]
    expect(engine, prompts)
    engine.reset_prefix_cache()
    connector.fail_loads = fail_loads
    once = engine._scheduler.take_results
    monkeypatch.setattr(engine._scheduler, "take_results", lambda results: (once(results), once(results)))
    expect(engine, prompts)
    assert_all_blocks_are_free(engine)
