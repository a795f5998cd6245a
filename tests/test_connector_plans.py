"""The pure parts of the connector: which chunks can be stored, from which blocks, how a stay is counted."""

from dataclasses import replace

import numpy as np
import pytest
from connector_loop import BLOCK, STATE_BLOCK, LoopRequest, hybrid_config
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_model import make_config

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import device_blocks
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.request_state import RequestState, Tail, Tenure
from jaxkv.connector.retention import Boundaries, Retention
from jaxkv.connector.spans import shrinking_prefixes
from jaxkv.connector.store_plan import SkipReason, plan_stores
from jaxkv.connector.tenures import StorePolicy, Tenures
from jaxkv.keys import GroupId, get_offload_block_hash, get_offload_group
from jaxkv.offload import OffloadPolicy, ReqContext
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

FULL, WINDOW, STATE = GroupId(0), GroupId(1), GroupId(2)
REQUEST = LoopRequest("r", list(range(100)))
CACHES = ChunkedCaches(hybrid_config(), 1)
LATENT, LOCAL, SINK = GroupId(0), GroupId(1), GroupId(2)


def other_kinds(blocks_per_chunk=1):
    """MLA, attention chunks of 10 tokens, and a window of 10 tokens with 6 sinks."""
    attention = (BLOCK, 1, 1, np.int64)
    specs = (
        MLAAttentionSpec(BLOCK, 1, np.int64),
        ChunkedLocalAttentionSpec(*attention, 10),
        SlidingWindowSpec(*attention, 10, sink_len=6),
    )
    groups = (KVCacheGroupSpec((f"layer.{index}",), spec, 64) for index, spec in enumerate(specs))
    return ChunkedCaches(KVCacheConfig(tuple(groups)), blocks_per_chunk)


def every(interval, caches=CACHES):
    return Boundaries(Retention(interval, (False,) * caches.num_groups))


def view(tables, previous, complete, *, next_chunk=(0, 0, 0), limit=100, boundaries=None, **further):
    return Tenure(
        REQUEST,
        ReqContext("r"),
        tables,
        complete_tokens=complete,
        previous_tokens=previous,
        begun_tokens=further.pop("begun", complete),
        first_chunk=[0, 0, 0],
        next_chunk=list(next_chunk),
        limit_tokens=limit,
        boundaries=boundaries or every(8),
        **further,
    )


def stored(plan):
    """``{(group, chunk): block ids}``; a tail's chunk is named by the tokens it is cut at."""
    found = {}
    for planned in plan.spans:
        span = planned.span
        rows = np.array(planned.block_ids).reshape(len(span), -1).tolist()
        names = span.chunks if span.cut_tokens is None else [f"cut at {span.cut_tokens}"]
        found.update({(span.group, name): tuple(row) for name, row in zip(names, rows, strict=True)})
    return found


def chunks_of(plan, group):
    return [chunk for owner, chunk in stored(plan) if owner == group]


def skipped(**counts):
    groups = {"full": FULL, "window": WINDOW, "state": STATE}
    return {
        (groups[name], reason): count for name, reasons in counts.items() for reason, count in reasons.items()
    }


def test_key_of_a_chunk_names_the_prefix_that_ends_with_it():
    (key,) = CACHES.keys(REQUEST.block_hashes, STATE, range(1, 2))
    assert get_offload_block_hash(key) == REQUEST.block_hashes[2 * STATE_BLOCK // BLOCK - 1]
    assert get_offload_group(key) == STATE


def test_chunk_of_a_drafter_has_a_name_one_link_later():
    config = make_config({"full": 1, "window": 1}, drafter="window", tokens_per_hash=2)
    named = ChunkedCaches(config, 1).num_named_chunks
    num_tokens = (0, 1, 3, 4, 5, 6, 8, 9, 10)
    assert [named(FULL, count) for count in num_tokens] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [named(WINDOW, count) for count in num_tokens] == [0, 0, 0, 0, 0, 1, 1, 1, 2]


def test_only_complete_chunks_within_the_limit_are_stored():
    tables = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31]]
    assert chunks_of(plan_stores(CACHES, view(tables, 0, 15)), FULL) == [0, 1, 2]
    assert set(stored(plan_stores(CACHES, view(tables, 0, 16, limit=11)))) == {
        (group, index) for group in (FULL, WINDOW) for index in (0, 1)
    }


@pytest.mark.parametrize("boundaries", [every(8), Boundaries(Retention.of(CACHES, None))])
@pytest.mark.parametrize("end", [[None], []])
def test_chunk_whose_block_the_request_does_not_hold_is_skipped(boundaries, end):
    plan = plan_stores(CACHES, view([[10, *end], [20, *end], end], 0, 8, boundaries=boundaries))
    assert stored(plan) == {(FULL, 0): (10,), (WINDOW, 0): (20,)}
    released = {SkipReason.RELEASED: 1}
    assert plan.skipped == skipped(full=released, window=released, state=released)


def test_blocks_released_before_the_last_step_are_not_read():
    """At 32 tokens a window of 10 reads tokens 23 to 31: block 5 may have been given back a step ago."""
    tables = [list(range(10)), list(range(20, 30)), [30, 31, 32, 33, 34]]
    plan = plan_stores(CACHES, view(tables, 32, 40))
    assert chunks_of(plan, WINDOW) == [5, 6, 7, 8, 9]
    assert chunks_of(plan, FULL) == list(range(10))


def test_window_chunk_keeps_only_blocks_a_later_token_can_read():
    caches = ChunkedCaches(hybrid_config(), 4)
    tables = [list(range(12)), list(range(20, 32)), [30, 31, 32, 33]]
    plan = plan_stores(caches, view(tables, 32, 48))
    assert stored(plan)[(WINDOW, 1)] == (-1, 25, 26, 27)
    assert stored(plan)[(WINDOW, 2)] == (-1, 29, 30, 31)


def test_window_chunk_of_which_a_needed_block_was_given_back_is_not_stored():
    """Refused at 32 tokens and offered again at 40, when block 5, which a hit of 32 reads, is gone."""
    caches = ChunkedCaches(hybrid_config(), 4)
    tables = [list(range(12)), list(range(20, 32)), [30, 31, 32, 33]]
    plan = plan_stores(caches, view(tables, 36, 40, next_chunk=(2, 1, 1)))
    assert stored(plan) == {}
    assert plan.skipped[WINDOW, SkipReason.RELEASED] == 1


def test_state_chunk_of_several_blocks_is_its_last_state():
    caches = ChunkedCaches(hybrid_config(), 2)
    plan = plan_stores(caches, view([[0] * 4, [0] * 4, [7, 8]], 8, 16))
    assert stored(plan)[(STATE, 0)] == (-1, 8)


def test_tail_of_several_blocks_is_those_up_to_its_end():
    """Chunks of 16 and 32 tokens, cut at 44: block 11 of tokens 44 to 47 is there and does not count."""
    caches = ChunkedCaches(hybrid_config(), 4)
    tables = [list(range(20)), list(range(20, 40)), [30, 31, 32, 33, 34, 35, 36, 37]]
    tail = Tail(44, (FULL, WINDOW, STATE))
    plan = plan_stores(caches, view(tables, 44, 44, next_chunk=(2, 2, 1), tail=tail, boundaries=every(32)))
    assert stored(plan) == {
        (FULL, "cut at 44"): (8, 9, 10, -1),
        (WINDOW, "cut at 44"): (28, 29, 30, -1),
        (STATE, "cut at 44"): (-1, 35, -1, -1),
    }


@pytest.mark.parametrize(("complete", "expected"), [(23, {}), (24, {2: (32,)}), (25, {})])
def test_state_is_stored_only_at_a_boundary_where_a_step_ended(complete, expected):
    tables = [[1] * 7, [2] * 7, [None, None, 32, 33]]
    plan = plan_stores(CACHES, view(tables, 9, complete, next_chunk=(9, 9, 0)))
    assert {chunk: blocks for (_, chunk), blocks in stored(plan).items()} == expected


@pytest.mark.parametrize("boundaries", [every(8), Boundaries(Retention.of(CACHES, None))])
@pytest.mark.parametrize(
    ("first", "previous", "complete", "expected"),
    [(2, 17, 24, [2]), (2, 17, 25, []), (1, 9, 24, [2]), (1, 16, 24, [1, 2]), (0, 9, 24, [2])],
)
def test_block_of_a_state_counts_only_where_a_step_ended(boundaries, first, previous, complete, expected):
    tables = [[1] * 7, [2] * 7, [30, 31, 32, 33]]
    stay = view(tables, previous, complete, next_chunk=(9, 9, first), boundaries=boundaries)
    assert chunks_of(plan_stores(CACHES, stay), STATE) == expected


def test_slots_of_drafted_tokens_are_never_stored():
    tables = [[1] * 4, [2] * 4, [30, 31, 90, 91]]
    plan = plan_stores(CACHES, view(tables, 8, 16, next_chunk=(4, 4, 0)))
    assert stored(plan) == {(STATE, 0): (30,), (STATE, 1): (31,)}


def test_local_chunk_that_ends_an_attention_chunk_is_not_stored():
    """At 20 tokens a new attention chunk begins: no hit reads block 4, of tokens 16 to 19."""
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(), view(tables, 12, 28, boundaries=every(4)))
    assert chunks_of(plan, LOCAL) == [2, 3, 5, 6]
    assert plan.skipped[LOCAL, SkipReason.RELEASED] == 2
    assert plan.skipped[LOCAL, SkipReason.UNREACHABLE] == 1
    assert chunks_of(plan, LATENT) == list(range(7))


def test_local_chunk_keeps_only_blocks_a_later_token_can_read():
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(4), view(tables, 0, 32, boundaries=every(16)))
    assert stored(plan)[(LOCAL, 0)] == (-1, -1, 22, 23)
    assert stored(plan)[(LOCAL, 1)] == (-1, -1, -1, 27)


def test_sinks_can_be_stored_as_long_as_the_request_runs():
    """At 32 tokens the window reads tokens 23 to 31; sinks are tokens 0 to 5, of blocks 0 and 1."""
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(), view(tables, 32, 40, boundaries=every(4)))
    assert chunks_of(plan, SINK) == [0, 1, 5, 6, 7, 8, 9]
    plan = plan_stores(other_kinds(), view(tables, 32, 40, next_chunk=(0, 0, 1), boundaries=every(4)))
    assert chunks_of(plan, SINK) == [1, 5, 6, 7, 8, 9], "and each is stored once"
    plan = plan_stores(other_kinds(8), view(tables, 32, 40, boundaries=every(32)))
    assert stored(plan)[(SINK, 0)] == (30, 31, -1, -1, -1, 35, 36, 37)


def test_shrinking_prefixes_get_shorter_and_start_at_the_first_chunk():
    plan = plan_stores(CACHES, view([list(range(10)), list(range(10)), [0] * 5], 0, 40))
    prefixes = list(shrinking_prefixes(CACHES, plan.spans))
    sizes = [
        max(p.span.chunks.stop * CACHES.tokens_per_chunk(p.span.group) for p in part) for part in prefixes
    ]
    assert sizes == [40, 20, 8, 4]
    assert [len(planned.span) for planned in prefixes[1]] == [5, 5], "no state stands before 40"
    for planned in prefixes[1]:
        assert planned.block_ids == list(range(5))
        assert planned.span.chunks == range(5)


def make_tenure():
    """A stay that begins with 8 tokens, and has something to store from 9 on."""
    request = replace(REQUEST, num_computed_tokens=8)
    return Tenure(
        request,
        ReqContext("r"),
        [[], [], []],
        complete_tokens=8,
        previous_tokens=8,
        begun_tokens=8,
        first_chunk=[0, 0, 0],
        next_chunk=[0, 0, 0],
        limit_tokens=None,
        boundaries=every(8),
        due_tokens=9,
    )


def test_what_a_request_counts_behind_a_step_that_was_not_reported_is_believed_when_the_next_is_planned():
    tenure = make_tenure()
    tenure.lose_step(1)
    tenure.request.num_computed_tokens = 9
    assert not tenure.end_step(2)  # The request may count the first of the two steps alone.
    assert (tenure.complete_tokens, tenure.begun_tokens) == (8, 11)
    tenure.request.num_computed_tokens = 10
    assert tenure.confirm()
    # Where the first one ended, nobody knows: a state may stand at its end, but not at the end of its drafts.
    assert (tenure.previous_tokens, tenure.complete_tokens, tenure.begun_tokens) == (10, 10, 10)


def test_tokens_that_no_step_accounts_for_may_have_cost_the_blocks_before_them():
    tenure = make_tenure()
    tenure.request.num_computed_tokens = 20
    assert tenure.end_step(2)
    assert (tenure.previous_tokens, tenure.complete_tokens, tenure.begun_tokens) == (20, 20, 20)


@pytest.mark.parametrize(("device_hit", "external", "complete"), [(8, 0, 8), (8, 16, 24), (100, 0, 99)])
def test_stay_begins_with_what_is_there_less_the_last_token_which_is_computed_anyway(
    device_hit, external, complete
):
    state = RequestState(
        REQUEST, ReqContext("r"), RequestParams(), OffloadPolicy.CHUNK_LEVEL, device_hit_tokens=device_hit
    )
    tenures = Tenures(CACHES, StorePolicy())
    state.tenure = tenures.begin(state, [[], [], []], external)
    assert (state.tenure.previous_tokens, state.tenure.complete_tokens) == (complete, complete)
    state.device_hit_tokens = None  # the load has landed, and the loop has not counted its tokens yet
    assert tenures.begin(state, [[], [], []], 0).complete_tokens == complete


def test_tokens_count_once_their_step_has_ended():
    tenure = make_tenure()
    tenure.add_blocks([[1], [2], [3]])
    assert (tenure.running, tenure.complete_tokens) == (False, 8)
    tenure.request.num_computed_tokens = 12
    assert tenure.end_step(4), "there is something to store"
    assert (tenure.running, tenure.complete_tokens) == (True, 12)
    assert tenure.tables == [[1], [2], [3]]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tenure.add_blocks([[1], [2]])


@pytest.mark.parametrize("num_computed_tokens", [9, 10, 12])
def test_tokens_count_when_the_loop_says_so_though_the_step_was_reported_before(num_computed_tokens):
    """Of four drafted tokens one, two or all were accepted."""
    tenure = make_tenure()
    assert not tenure.end_step(4)
    assert (tenure.complete_tokens, tenure.unconfirmed_tokens) == (8, 4)
    tenure.request.num_computed_tokens = num_computed_tokens
    assert tenure.confirm()
    assert (tenure.previous_tokens, tenure.complete_tokens) == (8, num_computed_tokens)
    assert tenure.unconfirmed_tokens == 0


def test_drafted_tokens_that_were_rejected_do_not_count():
    tenure = make_tenure()
    tenure.request.num_computed_tokens = 9
    tenure.end_step(4)
    assert tenure.complete_tokens == 9


@settings(max_examples=300)
@given(st.integers(1, 60), st.sampled_from([4, 8, 12]), st.integers(1, 30))
def test_groups_said_to_keep_all_need_every_chunk(window, block_size, interval_in_chunks):
    spec = SlidingWindowSpec(block_size, 1, 1, np.int64, sliding_window=window)
    full = FullAttentionSpec(block_size, 1, 1, np.int64)
    local = ChunkedLocalAttentionSpec(block_size, 1, 1, np.int64, 3 * block_size)
    groups = tuple(KVCacheGroupSpec((str(index),), kind, 9) for index, kind in enumerate((full, spec, local)))
    caches = ChunkedCaches(KVCacheConfig(groups), 1)
    retention = Retention.of(caches, interval_in_chunks * block_size)
    needs = Boundaries(retention).needs
    assert retention.keeps_all == tuple(
        all(needs(group, chunk) for chunk in range(40, 80)) for group in caches.hit_groups
    )


@pytest.mark.parametrize(("previous", "complete", "is_stored"), [(8, 12, True), (12, 14, False)])
def test_state_inside_a_block_is_stored_only_until_the_next_step_writes_over_it(
    previous, complete, is_stored
):
    tables = [[1] * 4, [2] * 4, [30, 31]]
    plan = plan_stores(
        CACHES, view(tables, previous, complete, next_chunk=(3, 3, 1), tail=Tail(12, (STATE,)))
    )
    assert ((STATE, "cut at 12") in stored(plan)) == is_stored
    assert plan.tail is None


def test_job_names_no_group_of_which_it_moves_nothing():
    ids = np.array([3, 4], np.int32)
    for block_ids in (ids, ids.tolist()):
        (blocks,) = device_blocks({FULL: block_ids, WINDOW: block_ids[:0]})
        assert (blocks.group, blocks.block_ids.tolist()) == (FULL, [3, 4])
        assert blocks.block_ids.dtype == np.int32


def test_states_handed_over_behind_the_limit_are_not_stored():
    handed = {(STATE, 8): 90, (STATE, 16): 91}
    tables = [[1] * 4, [2] * 4, [None, None]]
    plan = plan_stores(CACHES, view(tables, 0, 16, limit=8, next_chunk=(4, 4, 0), handed_states=handed))
    assert stored(plan) == {(STATE, 0): (90,)}
