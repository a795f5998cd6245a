"""The pure parts of the connector: which chunks can be stored, which are looked up, how a stay is counted."""

import numpy as np
import pytest
from connector_loop import BLOCK, STATE_BLOCK, LoopRequest, hybrid_config

from jaxkv.connector.chunks import ChunkedCaches, ChunkId
from jaxkv.connector.lookup import Deferral, find_hit
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.request_state import Tenure
from jaxkv.connector.store_plan import SkipReason, StoreView, plan_stores, shrinking_prefixes
from jaxkv.keys import GroupId, OffloadKey, get_offload_block_hash, get_offload_group
from jaxkv.offload import LookupResult, ReqContext
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
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


def view(tables, previous, complete, *, next_chunk=(0, 0, 0), limit=100):
    return StoreView(tables, REQUEST.block_hashes, next_chunk, previous, complete, limit)


def stored(plan):
    return {planned.chunk: planned.block_ids for planned in plan.chunks}


def test_key_of_a_chunk_names_the_prefix_that_ends_with_it():
    key = CACHES.key(REQUEST.block_hashes, ChunkId(STATE, 1))
    assert get_offload_block_hash(key) == REQUEST.block_hashes[2 * STATE_BLOCK // BLOCK - 1]
    assert get_offload_group(key) == STATE


def test_only_complete_chunks_within_the_limit_are_stored():
    tables = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31]]
    assert [
        chunk.index for chunk in stored(plan_stores(CACHES, view(tables, 0, 15))) if chunk.group == FULL
    ] == [
        0,
        1,
        2,
    ]
    assert set(stored(plan_stores(CACHES, view(tables, 0, 16, limit=11)))) == {
        ChunkId(group, index) for group in (FULL, WINDOW) for index in (0, 1)
    }


def test_chunk_whose_block_the_request_does_not_hold_is_skipped():
    plan = plan_stores(CACHES, view([[10, None], [20, None], [None]], 0, 8))
    assert stored(plan) == {ChunkId(FULL, 0): (10,), ChunkId(WINDOW, 0): (20,)}
    assert plan.skipped == {
        ChunkId(FULL, 1): SkipReason.RELEASED,
        ChunkId(WINDOW, 1): SkipReason.RELEASED,
        ChunkId(STATE, 0): SkipReason.RELEASED,
    }


def test_blocks_released_before_the_last_step_are_not_read():
    """At 32 tokens a window of 10 reads tokens 23 to 31: block 5 may have been given back a step ago."""
    tables = [list(range(10)), list(range(20, 30)), [30, 31, 32, 33, 34]]
    plan = plan_stores(CACHES, view(tables, 32, 40))
    assert [chunk.index for chunk in stored(plan) if chunk.group == WINDOW] == [5, 6, 7, 8, 9]
    assert [chunk.index for chunk in stored(plan) if chunk.group == FULL] == list(range(10))


def test_window_chunk_keeps_only_blocks_a_later_token_can_read():
    caches = ChunkedCaches(hybrid_config(), 4)
    tables = [list(range(12)), list(range(20, 32)), [30, 31, 32, 33]]
    plan = plan_stores(caches, view(tables, 32, 48))
    assert stored(plan)[ChunkId(WINDOW, 1)] == (-1, 25, 26, 27)
    assert stored(plan)[ChunkId(WINDOW, 2)] == (-1, 29, 30, 31)


def test_window_chunk_of_which_a_needed_block_was_given_back_is_not_stored():
    """Refused at 32 tokens and offered again at 40, when block 5, which a hit of 32 reads, is gone."""
    caches = ChunkedCaches(hybrid_config(), 4)
    tables = [list(range(12)), list(range(20, 32)), [30, 31, 32, 33]]
    plan = plan_stores(caches, view(tables, 36, 40, next_chunk=(2, 1, 1)))
    assert stored(plan) == {}
    assert plan.skipped[ChunkId(WINDOW, 1)] is SkipReason.RELEASED


def test_state_chunk_of_several_blocks_is_its_last_state():
    caches = ChunkedCaches(hybrid_config(), 2)
    plan = plan_stores(caches, view([[0] * 4, [0] * 4, [7, 8]], 8, 16))
    assert stored(plan)[ChunkId(STATE, 0)] == (-1, 8)


@pytest.mark.parametrize(("complete", "expected"), [(23, {}), (24, {2: (32,)}), (25, {})])
def test_state_is_stored_only_at_a_boundary_where_a_step_ended(complete, expected):
    tables = [[1] * 7, [2] * 7, [None, None, 32, 33]]
    plan = plan_stores(CACHES, view(tables, 9, complete, next_chunk=(9, 9, 0)))
    assert {chunk.index: blocks for chunk, blocks in stored(plan).items()} == expected


def test_slots_of_drafted_tokens_are_never_stored():
    tables = [[1] * 4, [2] * 4, [30, 31, 90, 91]]
    plan = plan_stores(CACHES, view(tables, 8, 16, next_chunk=(4, 4, 0)))
    assert stored(plan) == {ChunkId(STATE, 0): (30,), ChunkId(STATE, 1): (31,)}


def test_local_chunk_that_ends_an_attention_chunk_is_not_stored():
    """At 20 tokens a new attention chunk begins: no hit reads block 4, of tokens 16 to 19."""
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(), view(tables, 12, 28))
    assert [chunk.index for chunk in stored(plan) if chunk.group == LOCAL] == [2, 3, 5, 6]
    assert {chunk.index: reason for chunk, reason in plan.skipped.items() if chunk.group == LOCAL} == {
        0: SkipReason.RELEASED,
        1: SkipReason.RELEASED,
        4: SkipReason.UNREAD,
    }
    assert [chunk.index for chunk in stored(plan) if chunk.group == LATENT] == list(range(7))


def test_local_chunk_keeps_only_blocks_a_later_token_can_read():
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(4), view(tables, 0, 32))
    assert stored(plan)[ChunkId(LOCAL, 0)] == (-1, -1, 22, 23)
    assert stored(plan)[ChunkId(LOCAL, 1)] == (-1, -1, -1, 27)


def test_sinks_can_be_stored_as_long_as_the_request_runs():
    """At 32 tokens the window reads tokens 23 to 31; sinks are tokens 0 to 5, of blocks 0 and 1."""
    tables = [list(range(10)), list(range(20, 30)), list(range(30, 40))]
    plan = plan_stores(other_kinds(), view(tables, 32, 40))
    assert [chunk.index for chunk in stored(plan) if chunk.group == SINK] == [0, 1, 5, 6, 7, 8, 9]
    plan = plan_stores(other_kinds(8), view(tables, 32, 40))
    assert stored(plan)[ChunkId(SINK, 0)] == (30, 31, -1, -1, -1, 35, 36, 37)


def test_hit_takes_the_chunks_each_kind_of_attention_reads():
    caches, held = other_kinds(), []

    def lookup(key):
        held.append(key)
        return LookupResult.HIT

    found = find_hit(caches, REQUEST.block_hashes, 0, 35, lookup)
    assert found.boundary_tokens == 32
    assert found.chunks == (
        *(ChunkId(LATENT, index) for index in range(8)),
        ChunkId(LOCAL, 7),
        *(ChunkId(SINK, index) for index in (0, 1, 5, 6, 7)),
    )
    assert set(held) == set(found.keys), "nothing else is looked up"
    continued = find_hit(caches, REQUEST.block_hashes, 28, 35, lookup)
    assert continued.chunks == tuple(ChunkId(group, 7) for group in (LATENT, LOCAL, SINK))


def test_shrinking_prefixes_get_shorter_and_start_at_the_first_chunk():
    chunks = plan_stores(CACHES, view([list(range(10)), list(range(10)), [0] * 5], 0, 40)).chunks
    sizes = [max(planned.end_tokens for planned in prefix) for prefix in shrinking_prefixes(chunks)]
    assert sizes == [40, 20, 8, 4]


def answers(**by_group):
    """A lookup that answers from ``{group: {index: result}}`` and misses otherwise."""
    known: dict[OffloadKey, LookupResult] = {}
    for name, results in by_group.items():
        group = {"full": FULL, "window": WINDOW, "state": STATE}[name]
        for index, result in results.items():
            known[CACHES.key(REQUEST.block_hashes, ChunkId(group, index))] = result
    return lambda key: known.get(key, LookupResult.MISS)


def hits(*indices, **others):
    return {**dict.fromkeys(indices, LookupResult.HIT), **others}


def test_hit_is_limited_by_the_group_that_holds_least():
    lookup = answers(full=hits(*range(8)), window=hits(*range(6)), state=hits(0, 1, 2, 3))
    found = find_hit(CACHES, REQUEST.block_hashes, 0, 99, lookup)
    assert found.boundary_tokens == 24
    assert found.chunks == (
        *(ChunkId(FULL, index) for index in range(6)),
        *(ChunkId(WINDOW, index) for index in (3, 4, 5)),
        ChunkId(STATE, 2),
    )


def test_pending_chunk_that_the_hit_needs_defers_it():
    lookup = answers(full=hits(0) | {1: LookupResult.HIT_PENDING}, window=hits(0, 1), state=hits(0))
    assert find_hit(CACHES, REQUEST.block_hashes, 0, 99, lookup) is Deferral.PENDING


def test_pending_chunk_that_the_hit_does_not_need_defers_nothing():
    lookup = answers(full=hits(0, 1) | {2: LookupResult.HIT_PENDING}, window=hits(0, 1), state=hits(0))
    assert find_hit(CACHES, REQUEST.block_hashes, 0, 99, lookup).boundary_tokens == 8


def test_backend_that_asks_to_retry_defers_the_hit():
    lookup = answers(full=hits(0, 1), window=hits(0, 1), state={0: LookupResult.RETRY})
    assert find_hit(CACHES, REQUEST.block_hashes, 0, 99, lookup) is Deferral.RETRY


def make_tenure():
    return Tenure(REQUEST, ReqContext("r"), RequestParams(), [[], [], []], 8, 8, [0, 0, 0])


def test_tokens_count_once_their_step_has_ended():
    tenure = make_tenure()
    tenure.begin_step([[1], [2], [3]], 4)
    assert (tenure.running, tenure.complete_tokens) == (False, 8)
    tenure.end_step()
    tenure.end_step()
    assert (tenure.running, tenure.previous_tokens, tenure.complete_tokens) == (True, 8, 12)
    assert tenure.tables == [[1], [2], [3]]


def test_tokens_of_a_step_that_broke_off_never_count():
    tenure = make_tenure()
    tenure.begin_step((), 4)
    tenure.end_step()
    tenure.begin_step((), 4)
    tenure.begin_step((), 2)
    tenure.end_step()
    assert (tenure.previous_tokens, tenure.complete_tokens) == (12, 14)
