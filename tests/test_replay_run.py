"""Replays against counts made token by token, and what must hold of every result."""

from __future__ import annotations

import pytest

from jaxkv.connector import OffloadingConfig
from jaxkv.errors import ConfigError
from jaxkv.replay.backend import INSTANT_BACKEND
from jaxkv.replay.generator import Length, TraceParams, generate_trace
from jaxkv.replay.loop import ReplayLoop
from jaxkv.replay.models import find_model_shape
from jaxkv.replay.run import Deployment, replay
from jaxkv.replay.trace import Segment, TraceRequest
from jaxkv.testing.leaks import assert_no_leaks

TRACE = generate_trace(
    TraceParams(num_requests=40, max_tokens=4096, document_tokens=Length(900, 0.8), num_documents=6, seed=7)
)
LONGEST = max(request.num_tokens for request in TRACE)
ROOMY = {"device_bytes": 1 << 30, "host_bytes": 1 << 40, "prefill_tokens": 512}
BLOCK = 16


def tokens_of(request: TraceRequest) -> list[tuple[int, int]]:
    segments = (*request.prompt, request.output)
    return [(segment.stream, at) for segment in segments for at in range(segment.num_tokens)]


def known_prefix(tokens: list[tuple[int, int]], earlier: list[list[tuple[int, int]]]) -> int:
    longest = 0
    for other in earlier:
        common = next(
            (i for i, pair in enumerate(zip(tokens, other, strict=False)) if pair[0] != pair[1]), None
        )
        longest = max(longest, min(len(tokens), len(other)) if common is None else common)
    return longest


def most_reusable(trace: list[TraceRequest]) -> list[int]:
    """Prompt tokens each request can reuse if nothing is ever lost, counted token by token."""
    earlier: list[list[tuple[int, int]]] = []
    reusable = []
    for request in trace:
        tokens = tokens_of(request)
        longest = known_prefix(tokens[: request.prompt_tokens - 1], earlier)
        reusable.append(longest - longest % BLOCK)
        earlier.append(tokens[:-1])
    return reusable


@pytest.mark.parametrize("model", ["llama-like", "gemma-like"])
def test_with_room_for_everything_each_request_reuses_all_that_was_ever_computed(model):
    deployment = Deployment(model=model, **ROOMY)
    config = deployment.cache_config(LONGEST)
    with ReplayLoop(config, deployment.offloading(), max_tokens=LONGEST, prefill_tokens=512) as loop:
        served = [loop.serve(request) for request in TRACE]
        assert_no_leaks(loop.connector)
    assert [one.device_tokens + one.host_tokens for one in served] == most_reusable(TRACE)
    assert sum(one.host_tokens for one in served) > 0
    result = replay(TRACE, deployment)
    assert (result.device_tokens, result.host_tokens) == (
        sum(one.device_tokens for one in served),
        sum(one.host_tokens for one in served),
    )
    assert result.host_tokens <= result.optimal_host_tokens <= result.reusable_tokens
    assert result.servable_prompts == result.distinct_prompts == len(TRACE)
    assert all(group.evicted_chunks == 0 for group in result.groups)


@pytest.mark.parametrize("model", ["llama-like", "gemma-like", "bamba-like"])
@pytest.mark.parametrize("host_bytes", [64 << 20, 1 << 30])
def test_origins_add_up_and_no_pool_beats_the_optimum(model, host_bytes):
    scale = 8 if model == "bamba-like" else 1
    host_bytes *= scale
    sizes = {"device_bytes": scale << 30, "host_bytes": host_bytes}
    result = replay(TRACE, Deployment(model=model, **{**ROOMY, **sizes}))
    assert result.prompt_tokens == sum(request.prompt_tokens for request in TRACE)
    assert result.device_tokens + result.host_tokens + result.computed_tokens == result.prompt_tokens
    assert 0 <= result.host_tokens <= result.optimal_host_tokens <= result.reusable_tokens
    assert result.hit_rate <= result.optimal_hit_rate <= result.highest_hit_rate <= 1
    assert 0 <= result.servable_prompts <= result.distinct_prompts
    held = sum(
        group.resident_chunks * group.stored_bytes // group.stored_chunks
        for group in result.groups
        if group.stored_chunks
    )
    assert 0 < held <= host_bytes


def test_a_larger_pool_of_full_attention_serves_more_until_it_holds_everything():
    results = [
        replay(TRACE, Deployment(model="llama-like", **{**ROOMY, "host_bytes": size}))
        for size in (1 << 30, 2 << 30, 16 << 30)
    ]
    rates = [result.hit_rate for result in results]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] == pytest.approx(sum(most_reusable(TRACE)) / results[0].prompt_tokens)
    assert results[-1].optimal_hit_rate == results[-1].highest_hit_rate


def test_a_device_that_holds_everything_leaves_nothing_for_the_host():
    deployment = Deployment(model="llama-like", **{**ROOMY, "device_bytes": 16 << 30})
    result = replay(TRACE, deployment)
    assert (result.device_tokens, result.host_tokens) == (sum(most_reusable(TRACE)), 0)
    assert (result.optimal_host_tokens, result.device_evictions) == (0, 0)


def test_prompt_only_stores_no_replies():
    both = replay(TRACE, Deployment(**ROOMY))
    prompts = replay(TRACE, Deployment(**ROOMY, offload_prompt_only=True))
    assert prompts.groups[0].stored_chunks < both.groups[0].stored_chunks
    assert prompts.host_tokens <= prompts.optimal_host_tokens
    assert prompts.device_tokens + prompts.reusable_tokens < both.device_tokens + both.reusable_tokens


@pytest.mark.parametrize(("output_tokens", "blocks"), [(12, 6), (13, 7), (29, 8)])
def test_all_but_the_last_generated_token_is_computed_and_stored(output_tokens, blocks):
    request = TraceRequest("a", 0.0, (Segment(0, 100),), Segment(1, output_tokens))
    result = replay([request], Deployment(model="llama-like", **ROOMY))
    assert result.groups[0].stored_chunks == blocks


def test_a_recurrent_model_reuses_states_where_steps_ended():
    """Snapshots lie 1,024 tokens apart, in prompts and replies, and at the last link of each prompt."""
    shared = Segment(0, 2500)
    requests = [
        TraceRequest("a", 0.0, (shared,), Segment(1, 1700)),
        TraceRequest("b", 1.0, (shared, Segment(1, 700), Segment(2, 100)), Segment(3, 10)),
        TraceRequest("c", 2.0, (shared, Segment(4, 100)), Segment(5, 10)),
    ]
    deployment = Deployment(model="bamba-like", **{**ROOMY, "device_bytes": 4 << 30})
    config = deployment.cache_config(8192)
    with ReplayLoop(config, deployment.offloading(), max_tokens=8192, prefill_tokens=4096) as loop:
        served = [loop.serve(request) for request in requests]
    assert [one.device_tokens + one.host_tokens for one in served] == [0, 3072, 2496]


@pytest.mark.parametrize(("tokens", "servable"), [(10, 0), (16, 0), (17, 1), (500, 1)])
def test_a_prompt_shorter_than_a_chunk_is_servable_only_if_the_host_has_some_of_it(tokens, servable):
    request = TraceRequest("a", 0.0, (Segment(0, tokens),), Segment(1, 1))
    result = replay([request], Deployment(model="bamba-like", **{**ROOMY, "device_bytes": 4 << 30}))
    assert (result.servable_prompts, result.distinct_prompts) == (servable, 1)


def test_a_device_too_small_for_a_request_is_a_named_error():
    with pytest.raises(ConfigError, match="bytes would suffice"):
        replay(TRACE, Deployment(device_bytes=1 << 20))


def test_nothing_to_replay_is_a_named_error():
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay([], Deployment())


def test_an_unknown_model_shape_lists_the_known_ones():
    with pytest.raises(ConfigError, match="llama-like"):
        find_model_shape("palm-like")


def test_the_backend_is_found_by_its_name():
    assert OffloadingConfig("1MiB", backend=INSTANT_BACKEND).backend == "jaxkv.replay.backend.InstantSpec"
