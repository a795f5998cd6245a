"""Traces: their generator, their files, and hashes that say which prefixes are the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise, product

import pytest

from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash
from jaxkv.replay.generator import Length, TraceParams, generate_trace
from jaxkv.replay.trace import Segment, TraceRequest, chain_hashes
from jaxkv.replay.trace_file import load_trace, save_trace

ROOT = BlockHash(b"trace")
SMALL = TraceParams(num_requests=150, max_tokens=4096, document_tokens=Length(900, 0.8), seed=3)


def conversation(request: TraceRequest) -> str:
    return request.name.partition(".")[0]


def turn(request: TraceRequest) -> int:
    return int(request.name.partition(".")[2])


# -- the generator ------------------------------------------------------------------------------------------


def test_the_same_parameters_give_the_same_trace():
    assert generate_trace(SMALL) == generate_trace(SMALL)
    assert generate_trace(SMALL) != generate_trace(replace(SMALL, seed=4))


def test_a_trace_of_some_version_stays_the_trace_it_was():
    """Results of replays are compared over years; a change of the generator must be a decision."""
    (request, *_), other = generate_trace(TraceParams(num_requests=3)), generate_trace(SMALL)
    assert request.prompt == (Segment(2, 697), Segment(8, 4321), Segment(72, 839))
    assert sum(one.prompt_tokens for one in other) == 265_588


@pytest.mark.parametrize("max_tokens", [16, 100, 4096])
def test_requests_are_as_many_as_asked_in_order_and_no_longer_than_allowed(max_tokens):
    trace = generate_trace(replace(SMALL, max_tokens=max_tokens))
    assert len(trace) == SMALL.num_requests
    assert len({request.name for request in trace}) == len(trace)
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(trace))
    assert max(request.num_tokens for request in trace) <= max_tokens


def test_default_contexts_go_up_to_128k_tokens():
    trace = generate_trace(TraceParams(num_requests=2000))
    assert max(request.num_tokens for request in trace) > 100_000


def test_a_turn_goes_on_from_something_said_before():
    said: dict[str, set[tuple[Segment, ...]]] = {}
    for request in sorted(generate_trace(SMALL), key=turn):
        basis = request.prompt[:-1]
        if turn(request):
            assert basis in said[conversation(request)]
        said.setdefault(conversation(request), {basis}).add((*request.prompt, request.output))


@pytest.mark.parametrize(("branch_share", "all_follow"), [(0.0, True), (0.9, False)])
def test_only_branches_leave_the_last_turn(branch_share, all_follow):
    last: dict[str, tuple[Segment, ...]] = {}
    follows = []
    for request in sorted(generate_trace(replace(SMALL, branch_share=branch_share)), key=turn):
        if turn(request):
            follows.append(request.prompt[:-1] == last[conversation(request)])
        last[conversation(request)] = (*request.prompt, request.output)
    assert all(follows) == all_follow


def test_popularity_follows_the_zipf_exponent():
    def share_of_first(exponent: float) -> float:
        trace = generate_trace(replace(SMALL, num_requests=1000, zipf_exponent=exponent))
        counts = Counter(request.prompt[0].stream for request in trace if turn(request) == 0)
        return counts[0] / counts.total()

    assert share_of_first(0.0) < 0.2
    assert 0.3 < share_of_first(1.0) < 0.45
    assert share_of_first(3.0) > 0.75


@pytest.mark.parametrize(
    "wrong",
    [{"num_requests": 0}, {"mean_turns": 0.5}, {"branch_share": 1.5}, {"max_tokens": 8}, {"seed": -1}],
)
def test_parameters_that_cannot_work_are_named_errors(wrong):
    with pytest.raises(ConfigError):
        replace(SMALL, **wrong)


# -- hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_hash", [1, 2, 3, 4])
def test_hashes_are_equal_exactly_where_prefixes_are(tokens_per_hash):
    """All sequences of up to four segments of two streams: a hash for each prefix, a prefix for each hash."""
    pieces = [Segment(stream, length) for stream in (0, 1) for length in (1, 2, 5)]
    hash_of: dict[tuple[tuple[int, int], ...], bytes] = {}
    for segments in chain.from_iterable(product(pieces, repeat=number) for number in range(5)):
        tokens = tuple((one.stream, at) for one in segments for at in range(one.num_tokens))
        hashes = chain_hashes(segments, tokens_per_hash, ROOT)
        assert len(hashes) == len(tokens) // tokens_per_hash
        for number, block_hash in enumerate(hashes, 1):
            assert hash_of.setdefault(tokens[: number * tokens_per_hash], block_hash) == block_hash
    assert len(set(hash_of.values())) == len(hash_of)


def test_chains_of_another_root_share_nothing():
    segments = (Segment(0, 100), Segment(1, 7))
    here, there = chain_hashes(segments, 16, ROOT), chain_hashes(segments, 16, BlockHash(b"other"))
    assert not set(here) & set(there)


# -- files --------------------------------------------------------------------------------------------------


def test_a_saved_trace_is_loaded_as_it_was(tmp_path):
    trace = generate_trace(SMALL)
    save_trace(tmp_path / "trace.jsonl", trace)
    assert load_trace(tmp_path / "trace.jsonl") == trace


def test_lines_of_mooncake_become_segments(tmp_path):
    lines = [
        {"timestamp": 3052, "input_length": 1500, "output_length": 0, "hash_ids": [0, 5]},
        {"timestamp": 27, "input_length": 700, "output_length": 490, "hash_ids": [0, 14]},
    ]
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    early, late = load_trace(path)
    assert (early.arrival_s, late.arrival_s) == (0.027, 3.052)
    assert early.prompt == (Segment(0, 512), Segment(28, 188))
    assert early.output_tokens == 490
    assert [one.num_tokens for one in late.prompt] == [512, 512, 476]
    assert late.prompt[0] == early.prompt[0]
    assert late.prompt_tokens == 1500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request"),
        ("not json", "line 1 is no request"),
        ('{"name": "a", "arrival_s": 0, "prompt": [[0, 0]], "output": [1, 1]}', "line 1 is no request"),
        ('{"name": "a", "arrival_s": 0, "output": [1, 1]}', "line 1 is no request"),
    ],
)
def test_a_file_that_is_no_trace_is_a_named_error(text, message, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_trace(path)


def test_a_missing_file_is_a_named_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load_trace(tmp_path / "nothing.jsonl")
