"""What cannot be served is refused by name, and a step that breaks off loses no request."""

from __future__ import annotations

import os
import signal

import pytest
from serving_fake_connector import FakeConnector
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.errors import ConfigError, DeletedCacheError, RequestError
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.serving import engine as serving_engine
from jaxkv.serving.interrupts import hold_interrupts

BLOCKS = {"full": 30, "window": 14, "state": 4}


class Planned(Exception):
    """The failure a test asked for."""


@pytest.fixture
def engine():
    model = ToyModel()
    config = make_config(model, 4, **BLOCKS)
    options = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    return share_programs(LLMEngine(model, config, options, FakeConnector(config, load_steps=1)))


def fail_once(monkeypatch, owner, name, error, *, after=0, before_call=True):
    """Make the call of ``owner.name`` that follows ``after`` others raise, before or after its work."""
    original = getattr(owner, name)
    calls = iter(range(1_000_000))

    def wrapped(*args, **kwargs):
        if next(calls) != after:
            return original(*args, **kwargs)
        if not before_call:
            original(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([97], {}, r"must lie in \[0, 97\), got 97 to 97"),
        ([-1, 3], {}, "got -1 to 3"),
        ([1] * 250, {"max_new_tokens": 10}, "250 prompt tokens and 10 new ones are more than the 256"),
        ([1] * 120, {"max_new_tokens": 10}, "needs 33 blocks of FullAttentionSpec but the cache has 30"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_the_remedy(engine, prompt, params, message):
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests


def test_a_used_request_id_is_refused(engine):
    engine.add_request([1], request_id="a")
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        engine.add_request([2], request_id="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 or a positive number, got -0.5"),
        ({"temperature": float("nan")}, "got nan"),
        ({"seed": -1}, "seed must fit in 32 bits without a sign, got -1"),
    ],
)
def test_bad_sampling_params_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"prefill_shapes": ()}, "prefill_shapes must ascend"),
        ({"prefill_shapes": (32, 32)}, "prefill_shapes must ascend"),
        ({"prefill_budget": 8}, "less than the smallest prefill shape 32"),
    ],
)
def test_bad_engine_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


POINTS = [
    ("connector", "get_num_new_matched_tokens"),
    ("connector", "update_state_after_alloc"),
    ("connector", "build_connector_meta"),
    ("connector", "handle_preemptions"),
    ("connector", "bind_connector_metadata"),
    ("connector", "start_load_kv"),
    ("connector", "wait_for_save"),
    ("connector", "get_transfer_results"),
    ("connector", "update_connector_output"),
    ("connector", "request_finished_all_groups"),
    ("programs", "run"),
    ("programs", "fill"),
    ("cache", "extend"),
    ("cache", "register"),
    ("engine", "_read_tokens"),
]


@pytest.mark.parametrize("error", [Planned(), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_a_step_that_breaks_off_loses_no_request(engine, monkeypatch, owner, name, error):
    prompts = [random_prompt(seed, 40 + seed) for seed in range(5)]
    owners = {
        "connector": engine.connector,
        "programs": engine._programs,
        "cache": engine._cache,
        "engine": serving_engine,
    }
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    fail_once(monkeypatch, owners[owner], name, error, after=3)
    done, failures = {}, 0
    while engine.has_unfinished_requests:
        try:
            outputs = engine.step()
        except (Planned, KeyboardInterrupt):
            failures += 1
            continue
        done.update((output.request_id, output.output_ids) for output in outputs)
    done.update((output.request_id, output.output_ids) for output in engine.step())
    assert failures == 1
    assert done == {key: oracle_tokens(prompt, 6) for key, prompt in zip(ids, prompts, strict=True)}
    engine.flush()
    assert all(pool.num_free == pool.num_blocks for pool in engine._cache.pools)


@pytest.mark.parametrize("after", range(2, 9))
@pytest.mark.parametrize(
    ("owner", "name"),
    [("engine", "_is_lost"), ("scheduler", "restart_all"), ("cache", "release")],
    ids=["is_lost", "restart_all", "release"],
)
def test_ctrl_c_while_a_step_that_broke_off_is_cleared_up_loses_no_request(
    engine, monkeypatch, owner, name, after
):
    """The step may be running still, so that is where somebody waits who presses the keys again."""
    owners = {"engine": serving_engine, "scheduler": engine._scheduler, "cache": engine._cache}
    prompts = [random_prompt(seed, 40 + seed) for seed in range(2)]
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    read_tokens = serving_engine._read_tokens
    calls = iter(range(1_000_000))

    def interrupted(running):
        if next(calls) == after:
            fail_once(monkeypatch, owners[owner], name, KeyboardInterrupt())
            raise KeyboardInterrupt
        return read_tokens(running)

    monkeypatch.setattr(serving_engine, "_read_tokens", interrupted)
    done, failures = {}, 0
    for _ in range(40):
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            failures += 1
            continue
        done.update((output.request_id, output.output_ids) for output in outputs)
    assert failures == 1
    assert done == {key: oracle_tokens(prompt, 6) for key, prompt in zip(ids, prompts, strict=True)}
    engine.flush()
    assert all(pool.num_free == pool.num_blocks for pool in engine._cache.pools)


def test_caches_consumed_by_a_failed_program_are_named_and_everything_is_recomputed(engine, monkeypatch):
    prompt = random_prompt(0, 40)
    engine.generate([prompt], SamplingParams(max_new_tokens=6))
    request_id = engine.add_request(prompt, SamplingParams(max_new_tokens=6))
    fail_once(monkeypatch, engine._programs, "run", Planned(), before_call=False)
    with pytest.raises(DeletedCacheError, match=r"call step\(\) to go on or abort_all\(\)"):
        engine.step()
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert [(output.request_id, output.output_ids) for output in outputs] == [
        (request_id, oracle_tokens(prompt, 6))
    ]


def test_generate_that_is_interrupted_leaves_no_request_behind(engine, monkeypatch):
    fail_once(monkeypatch, engine._programs, "run", KeyboardInterrupt(), after=1)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([random_prompt(seed, 30) for seed in range(4)], SamplingParams())
    assert not engine.has_unfinished_requests
    prompt = random_prompt(9, 30)
    output = engine.generate([prompt], SamplingParams(max_new_tokens=5))[0]
    assert output.output_ids == oracle_tokens(prompt, 5)


def test_a_refused_prompt_in_generate_leaves_the_others_out_too(engine):
    with pytest.raises(RequestError, match="empty"):
        engine.generate([[1, 2], []], SamplingParams())
    assert not engine.has_unfinished_requests


def test_ctrl_c_in_a_step_is_raised_when_the_step_has_ended_and_costs_nothing(engine, monkeypatch):
    original = engine._programs.run

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    prompt = random_prompt(0, 8)
    request_id = engine.add_request(prompt, SamplingParams(max_new_tokens=2))
    engine.step()
    engine.step()
    monkeypatch.setattr(engine._programs, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine._programs, "run", original)
    assert engine.stats.num_preemptions == 0
    assert [(output.request_id, output.output_ids) for output in engine.step()] == [
        (request_id, oracle_tokens(prompt, 2))
    ]


def press_ctrl_c(times, reached):
    with hold_interrupts():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        reached.append("end")


@pytest.mark.parametrize(("times", "reached"), [(1, ["end"]), (2, [])])
def test_the_first_ctrl_c_waits_for_the_end_and_the_second_does_not(times, reached):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c(times, seen)
    assert seen == reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_is_not_lost_when_the_block_fails_too():
    def fail_after_ctrl_c():
        with hold_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            raise Planned

    with pytest.raises(KeyboardInterrupt) as raised:
        fail_after_ctrl_c()
    assert isinstance(raised.value.__context__, Planned)


def test_a_connector_that_cannot_take_the_end_of_a_request_is_told_again(engine, monkeypatch):
    told = []
    original = engine.connector.request_finished_all_groups

    def flaky(request, tables):
        told.append(request.request_id)
        if len(told) == 1:
            raise Planned
        return original(request, tables)

    monkeypatch.setattr(engine.connector, "request_finished_all_groups", flaky)
    request_id = engine.add_request([1, 2, 3])
    with pytest.raises(Planned):
        engine.abort(request_id)
    assert not engine.has_unfinished_requests
    engine.flush()
    assert told == [request_id, request_id]
    assert request_id not in engine._scheduler
