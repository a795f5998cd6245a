"""Which chunks are kept for whom: retention intervals, ends of prompts and requests, branch points."""

from dataclasses import replace

import pytest
from connector_loop import Loop, expected_output
from engine_loop import EngineLoop
from loop_model import make_config
from loop_tools import held, holds, skipped
from toy_model import random_prompt

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.errors import ConfigError
from jaxkv.spec import KVCacheConfig
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec

PROMPT = list(range(100, 150))
KINDS = {"full": 1, "window": 1, "local": 1, "state": 1}
EVERY_4 = set(range(4, 49, 4))
FULL, WINDOW, LOCAL, STATE = range(4)


def serve_once(retention_interval, *, prompt=PROMPT, new=1, **options):
    """A loop whose steps end at every state, after one request; and the request."""
    loop = Loop(
        config=make_config(KINDS), retention_interval=retention_interval, max_step_tokens=8, **options
    )
    return loop, loop.serve("first", prompt, new)


def test_without_an_interval_every_boundary_is_kept():
    """All that a hit at any multiple of 8 reads: of attention chunks of 12 nothing that only ends one."""
    loop, first = serve_once(None)
    assert held(loop, first, FULL) == held(loop, first, WINDOW) == EVERY_4
    assert held(loop, first, STATE) == {8, 16, 24, 32, 40, 48}
    assert held(loop, first, LOCAL) == {4, 8, 16, 28, 32, 40}
    for length in range(9, 51, 8):
        assert loop.serve(f"{length}", PROMPT[:length]).host_hits == [length - 1]
    loop.close()


def test_with_interval_0_only_the_end_of_the_prompt_is_kept():
    """At 48 a window of 10 reads the tokens from 39 on, an attention chunk of 12 begins, a state stands."""
    loop, first = serve_once(0)
    assert held(loop, first, FULL) == EVERY_4
    assert held(loop, first, WINDOW) == {40, 44, 48}
    assert held(loop, first, LOCAL) == set()
    assert held(loop, first, STATE) == {48}
    assert skipped(loop, WINDOW) == {"unreachable": 9}
    assert skipped(loop, STATE) == {"unreachable": 5}
    assert loop.serve("again", PROMPT, 3).host_hits == [48]
    assert loop.outputs["again"] == expected_output(PROMPT, 3)
    assert loop.serve("short", PROMPT[:30]).host_hits == []
    loop.close()


def test_with_an_interval_its_multiples_are_kept_too():
    loop, first = serve_once(16)
    assert held(loop, first, WINDOW) == {8, 12, 16, 24, 28, 32, 40, 44, 48}
    assert held(loop, first, LOCAL) == {16, 28, 32}
    assert held(loop, first, STATE) == {16, 32, 48}
    for length, hit in ((50, 48), (40, 32), (30, 16)):
        assert loop.serve(f"{length}", PROMPT[:length], 2).host_hits == [hit]
        assert loop.outputs[f"{length}"] == expected_output(PROMPT[:length], 2)
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [2, 3])
def test_an_interval_counts_in_chunks(blocks_per_chunk):
    size = 8 * blocks_per_chunk
    loop = Loop(
        config=make_config({"full": 1, "window": 1, "state": 1}),
        retention_interval=size,
        blocks_per_chunk=blocks_per_chunk,
        max_step_tokens=size,
    )
    loop.serve("first", PROMPT)
    for boundary in range(size, 49, size):
        assert loop.serve(f"{boundary}", PROMPT[: boundary + 1], 2).host_hits == [boundary]
        assert loop.outputs[f"{boundary}"] == expected_output(PROMPT[: boundary + 1], 2)
    loop.close()


@pytest.mark.parametrize(("interval", "blocks_per_chunk"), [(4, 1), (12, 1), (8, 2), (7, 1)])
def test_an_interval_at_which_no_hit_can_end_is_refused_by_value(interval, blocks_per_chunk):
    config = make_config(KINDS)
    spec = FakeOffloadingSpec(config, FakePool(1 << 16), blocks_per_chunk=blocks_per_chunk)
    options = OffloadingConfig(host_bytes=1, retention_interval=interval, blocks_per_chunk=blocks_per_chunk)
    with pytest.raises(ConfigError, match=f"retention_interval is {interval}.*multiple"):
        OffloadingConnector(options, config, spec=spec)


def test_a_connector_that_refuses_its_interval_leaves_the_backend_to_others(monkeypatch):
    config = make_config(KINDS)
    spec = FakeOffloadingSpec(config, FakePool(1 << 16))
    refused = OffloadingConfig(host_bytes=1 << 20, retention_interval=4)
    with pytest.raises(ConfigError):
        OffloadingConnector(refused, config, spec=spec)
    OffloadingConnector(OffloadingConfig(host_bytes=1), config, spec=spec).shutdown()
    monkeypatch.setattr("jaxkv.offload.host.HostPool", None)
    with pytest.raises(ConfigError):
        OffloadingConnector(refused, config)


# -- ends of requests -----------------------------------------------------------------------------------


def with_window(size):
    """Full attention and a window; one of 12 tokens lies in whole blocks while a block is being filled."""
    full, window = make_config({"full": 1, "window": 1}).groups
    return KVCacheConfig((full, replace(window, spec=replace(window.spec, sliding_window=size))))


@pytest.mark.parametrize("num_new", [11, 12, 13, 14, 19])
def test_the_window_of_generated_tokens_is_kept_where_a_request_ended(num_new):
    """Chunks that no boundary needed when they were complete are stored when the end needs them."""
    loop = Loop(config=with_window(12), retention_interval=0, offload_prompt_only=False)
    first = loop.serve("first", PROMPT[:21], num_new)
    computed = 21 + num_new - 1
    end = computed - computed % 4
    read = {chunk for chunk in range(4, end + 1, 4) if chunk > end - 11}
    assert held(loop, first, 1) == {12, 16, 20} | read
    tokens = [*PROMPT[:21], *loop.outputs["first"], 1, 2]
    assert loop.serve("next turn", tokens, 3).host_hits == [end]
    assert loop.outputs["next turn"] == expected_output(tokens, 3)
    loop.close()


def test_a_request_that_ended_by_abort_or_preemption_can_be_continued_as_well():
    loop = Loop(config=with_window(12), retention_interval=0, offload_prompt_only=False)
    first = loop.add("first", PROMPT[:21], 40)
    for _ in range(20):
        loop.step()
    computed = first.num_computed_tokens
    loop.abort(first)
    loop.run()
    assert loop.serve("next turn", [*first.tokens, 1], 3).host_hits == [computed - computed % 4]
    loop.close()


def test_the_end_of_a_request_does_not_count_where_its_window_has_passed_already():
    """At 34 tokens a window of 10 has given up a block that a hit at 32 reads; the prompt's end is left."""
    loop = Loop(config=with_window(10), retention_interval=0, offload_prompt_only=False)
    loop.serve("first", PROMPT[:21], 14)
    tokens = [*PROMPT[:21], *loop.outputs["first"], 1, 2]
    assert loop.serve("next turn", tokens, 3).host_hits == [20]
    assert loop.outputs["next turn"] == expected_output(tokens, 3)
    loop.close()


def test_only_prompts_are_kept_where_only_prompts_are_stored():
    config = make_config({"full": 1, "window": 1})
    loop = Loop(config=config, retention_interval=0)
    first = loop.serve("first", PROMPT[:21], 19)
    assert held(loop, first, 1) == {12, 16, 20}
    assert max(held(loop, first, 0)) == 20
    loop.close()


def test_a_prompt_end_and_its_tail_are_both_kept():
    """Of 46 tokens with states of 8 and links of 4: the last whole chunks end at 40, the last link at 44."""
    loop = Loop(retention_interval=0, max_step_tokens=64)
    loop.cuts_at_boundaries = True
    first = loop.serve("first", PROMPT[:46])
    assert loop.connector.get_snapshot_boundaries(first) == (40, 44)
    assert [holds(loop, first, 2, end) for end in (8, 40, 44)] == [False, True, True]
    assert loop.serve("same", PROMPT[:46]).host_hits == [44]
    assert loop.serve("other", [*PROMPT[:42], 1, 2]).host_hits == [40]
    loop.close()


# -- branch points --------------------------------------------------------------------------------------


def branches(shared, count):
    return [[*shared, number, *(number + 10 * place for place in range(20))] for number in range(count)]


def test_the_second_request_that_leaves_a_prefix_makes_the_third_hit_there():
    """24 tokens are shared. The first leaves what its own end needs, the second what the branch needs."""
    loop = Loop(retention_interval=0, max_step_tokens=64)
    loop.cuts_at_boundaries = True
    prompts = branches(PROMPT[:27], 4)
    requests = [loop.serve(f"r{number}", prompt, 2) for number, prompt in enumerate(prompts)]
    assert [request.host_hits for request in requests] == [[], [], [24], [24]]
    assert loop.connector.get_snapshot_boundaries(loop.add("r4", prompts[0])) != (24,)
    for number, prompt in enumerate(prompts):
        assert loop.outputs[f"r{number}"] == expected_output(prompt, 2)
    loop.run()
    loop.close()


@pytest.mark.parametrize(
    "kinds", [("full", "window", "state"), ("full", "window"), ("latent", "local", "state")]
)
@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_the_engine_ends_a_step_where_prompts_branch(kinds, blocks_per_chunk):
    """Its steps are 32 tokens long otherwise; the device remembers nothing between requests."""
    loop = EngineLoop(kinds, retention_interval=0, blocks_per_chunk=blocks_per_chunk)
    shared = random_prompt(0, 51)
    prompts = [[*shared, number, *random_prompt(number, 40)] for number in range(4)]
    hits = [loop.serve(f"r{number}", prompt, 2).host_hit_tokens for number, prompt in enumerate(prompts)]
    alignment = loop.connector.snapshot_interval_tokens
    branch = 51 - 51 % alignment
    assert hits == [0, 0, branch, branch], "before the second request nobody knew of the branch"
    loop.close()


def test_a_branch_on_the_device_makes_a_branch_on_the_host():
    """The second request finds the shared prefix on the device; the third finds it on the host."""
    loop = EngineLoop(("full", "window", "state"), retention_interval=0)
    shared = random_prompt(0, 48)
    loop.serve("warm", shared[:41])
    for number in range(2):
        loop.serve(f"r{number}", [*shared, number, *random_prompt(number, 40)], forget=False)
    assert loop.metrics["r1"].device_hit_tokens == 40
    assert loop.serve("r2", [*shared, 2, *random_prompt(2, 40)]).host_hit_tokens == 48
    loop.close()
