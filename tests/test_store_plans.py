"""Plans of stores to the last chunk: what a boundary adds at a request's end, tails that are lost, states."""

import numpy as np
import pytest
from loop_model import BLOCK, LoopRequest, hybrid_config, make_config

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.request_state import Tail, Tenure
from jaxkv.connector.retention import Boundaries, Retention
from jaxkv.connector.spans import unread_at_ends, whole_span
from jaxkv.connector.store_plan import SkipReason, next_due_tokens, plan_stores
from jaxkv.keys import GroupId
from jaxkv.offload import ReqContext
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

FULL, WINDOW, STATE = GroupId(0), GroupId(1), GroupId(2)
REQUEST = LoopRequest("r", list(range(100)))
CACHES = ChunkedCaches(hybrid_config(), 1)
TABLES = ([*range(10, 30)], [*range(40, 60)], [*range(70, 80)])


def make_stay(complete, *, caches=CACHES, tables=TABLES, interval=8, next_chunk=(0, 0, 0), **stay):
    return Tenure(
        REQUEST,
        ReqContext("r"),
        [list(table) for table in tables],
        complete_tokens=complete,
        previous_tokens=stay.pop("previous", complete),
        begun_tokens=stay.pop("begun", complete),
        first_chunk=list(stay.pop("first", [0] * caches.num_groups)),
        next_chunk=list(next_chunk),
        limit_tokens=stay.pop("limit", None),
        boundaries=Boundaries(Retention(interval, (False,) * caches.num_groups), stay.pop("points", ())),
        **stay,
    )


def plan(complete, *, caches=CACHES, **stay):
    return plan_stores(caches, make_stay(complete, caches=caches, **stay))


def stored(found):
    """``{(group, chunk): block}``; of a tail the tokens it is cut at stand for the chunk."""
    return {
        (span.group, chunk if span.cut_tokens is None else f"cut at {span.cut_tokens}"): block
        for span, blocks in ((planned.span, np.array(planned.block_ids).tolist()) for planned in found.spans)
        for chunk, block in zip(span.chunks, blocks, strict=True)
    }


def test_end_of_a_request_stores_what_only_a_hit_there_needs():
    """A hit at 24 reads window tokens from 15 on: chunk 3 serves 16 too, chunk 5 serves 32, chunk 4 none."""
    found = plan(24, interval=16, next_chunk=(6, 6, 3), has_ended=True)
    assert stored(found) == {(WINDOW, 4): 44, (STATE, 2): 72}
    assert found.skipped == {}
    assert found.next_chunk == [6, 6, 3]


def test_end_of_a_request_is_the_last_boundary_at_which_a_drafter_has_names_too():
    """Of 30 tokens 28 have links; the drafter's chunk at 28 would need the one at 32. A hit ends at 24."""
    caches = ChunkedCaches(make_config({"full": 1, "window": 1}, drafter="window"), 1)
    stay = {"previous": 24, "next_chunk": (7, 6), "has_ended": True}
    found = plan(30, caches=caches, tables=TABLES[:2], interval=None, **stay)
    assert stored(found) == {(WINDOW, chunk): 40 + chunk for chunk in (3, 4, 5)}


def test_end_of_a_request_stores_nothing_before_its_first_chunk():
    found = plan(24, interval=16, next_chunk=(6, 6, 3), first=(0, 5, 3), has_ended=True)
    assert stored(found) == {}
    assert found.skipped == {}


def test_request_that_goes_on_stores_nothing_it_passed_over():
    assert stored(plan(24, interval=16, next_chunk=(6, 6, 3))) == {}


def test_tail_of_which_one_group_is_lost_is_not_stored_and_counted_once():
    """The state that stood at 12 was written over: of the tail at 12 nothing else is of use."""
    found = plan(16, previous=14, next_chunk=(4, 4, 2), tail=Tail(12, (STATE,)))
    assert stored(found) == {}
    assert found.skipped == {(STATE, SkipReason.NO_STATE): 1}
    assert found.tail is None


def test_table_that_ends_before_a_chunk_does_not_hold_it():
    found = plan(8, tables=([10], [40], []))
    assert stored(found) == {(FULL, 0): 10, (WINDOW, 0): 40}
    assert found.skipped[WINDOW, SkipReason.RELEASED] == 1


def test_state_handed_over_is_stored_from_its_own_block_wherever_it_stands():
    found = plan(24, next_chunk=(6, 6, 0), handed_states={(STATE, 16): 99})
    assert stored(found) == {(STATE, 1): 99, (STATE, 2): 72}
    assert found.skipped == {(STATE, SkipReason.NO_STATE): 1}


@pytest.mark.parametrize(("previous", "expected"), [(8, {1: 71}), (16, {1: 71}), (12, {1: 71}), (0, {1: 71})])
def test_state_stands_only_where_the_last_step_ended(previous, expected):
    found = plan(16, previous=previous, next_chunk=(4, 4, 0))
    states = {chunk: block for (group, chunk), block in stored(found).items() if group == STATE}
    assert states == ({0: 70} | expected if previous == 8 else expected)


def test_each_chunk_of_a_window_is_asked_for_its_own_blocks():
    """In chunks of 4 blocks, a window of 10 reads tokens from 7 on: block 0 is unread at 16, and no other."""
    caches = ChunkedCaches(make_config({"window": 1}), 4)
    span = whole_span(caches, REQUEST.block_hashes, GroupId(0), range(2))
    assert list(unread_at_ends(caches, span)) == [range(1), range(4, 5)]


def test_window_of_one_token_keeps_no_chunk():
    spec = SlidingWindowSpec(BLOCK, 1, 1, np.int64, 1)
    caches = ChunkedCaches(KVCacheConfig((KVCacheGroupSpec(("a",), spec, 9),)), 1)
    assert stored(plan(16, caches=caches, tables=([1, 2, 3, 4],), interval=4, next_chunk=(0,))) == {}


@pytest.mark.parametrize(
    ("drafter", "limit", "tail", "due"),
    [
        ("", None, None, 12),
        ("full", None, None, 14),
        ("full", 13, None, None),
        ("full", 14, None, 14),
        ("full", None, Tail(10, (GroupId(0),)), 12),
    ],
)
def test_nothing_is_due_before_the_next_chunk_has_a_name(drafter, limit, tail, due):
    """Two chunks of each group are stored, and links are of two tokens."""
    kinds = {"full": 1, "state": 1}
    caches = ChunkedCaches(make_config(kinds, drafter=drafter, tokens_per_hash=2), 1)
    stay = make_stay(8, caches=caches, next_chunk=(2, 2), limit=limit, tail=tail)
    assert next_due_tokens(caches, stay) == due
