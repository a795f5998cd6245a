"""Block ids from the tables of a serving stack with pools of its own, and a request's way out and back."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv import (
    BlockIdError,
    BlockTransfer,
    ConfigError,
    FullAttentionSpec,
    HostPool,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    canonicalize,
)
from jaxkv.adapters import block_table, map_slots, page_ids, split_drafts, state_ids
from jaxkv.testing import assert_same_bytes, numpy_copy, random_caches


def slots_of(pages, page_size):
    return [page * page_size + at for page in pages for at in range(page_size)]


# -- token slots ------------------------------------------------------------------------------------------


@given(pages=st.lists(st.integers(0, 1000), max_size=8), page_size=st.integers(1, 9))
def test_token_slots_of_whole_pages_are_those_pages(pages, page_size):
    found = page_ids(np.array(slots_of(pages, page_size), np.int64), page_size)
    assert found.dtype == np.int32
    assert found.tolist() == pages


@given(
    pages=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    page_size=st.integers(2, 8),
    at=st.integers(0, 1000),
    wrong=st.integers(0, 500),
)
def test_one_slot_of_another_page_is_refused(pages, page_size, at, wrong):
    slots = slots_of(pages, page_size)
    at %= len(slots)
    if slots[at] == wrong:
        assert page_ids(slots, page_size).tolist() == pages
        return
    slots[at] = wrong
    page = at // page_size * page_size
    with pytest.raises(BlockIdError, match=f"tokens {page} to {page + page_size - 1}.*not one page"):
        page_ids(slots, page_size)


@given(
    pages=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    page_size=st.integers(1, 8),
    gone=st.sets(st.integers(0, 47)),
)
def test_a_page_with_a_slot_that_is_gone_is_not_held(pages, page_size, gone):
    slots = np.array(slots_of(pages, page_size))
    gone = [at for at in gone if at < slots.size]
    slots[gone] = -1
    expected = [
        -1 if any(at // page_size == index for at in gone) else page for index, page in enumerate(pages)
    ]
    assert page_ids(slots, page_size).tolist() == expected


def test_every_integer_dtype_and_a_jax_array_are_taken():
    for dtype in (np.int32, np.int64, np.uint16):
        assert page_ids(np.array([8, 9, 10, 11], dtype), 4).tolist() == [2]
    assert page_ids(jnp.array([8, 9, 10, 11]), 4).tolist() == [2]
    assert page_ids([], 4).tolist() == []


@pytest.mark.parametrize(
    ("slots", "options", "error", "message"),
    [
        ([4, 5, 6, 7, 8], {}, BlockIdError, "5 token slots are not whole pages of 4; pass the first 4"),
        ([5, 6, 7, 8], {}, BlockIdError, "not one page of 4; begin at a page boundary"),
        ([0, 1, 2, 3], {"num_reserved": 1}, BlockIdError, "0 is one of 1 reserved dummies.*pass -1"),
        ([0, 0, 0, 0], {"num_reserved": 1}, BlockIdError, "not one page"),
        ([4.0, 5.0, 6.0, 7.0], {}, BlockIdError, r"vector of integers, got float64\[4\]"),
        ([[4, 5, 6, 7]], {}, BlockIdError, r"got int64\[1, 4\]"),
    ],
)
def test_slots_that_are_no_pages_of_a_request_are_refused(slots, options, error, message):
    with pytest.raises(error, match=message):
        page_ids(slots, 4, **options)


def test_a_page_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="page_size must be at least 1, got 0"):
        page_ids([1], 0)


# -- index maps -------------------------------------------------------------------------------------------


@given(
    index_map=st.lists(st.integers(-3, 60), min_size=1, max_size=30),
    data=st.data(),
)
def test_the_map_gives_the_slot_of_the_other_pool_or_none(index_map, data):
    slots = data.draw(st.lists(st.integers(-2, len(index_map) - 1), max_size=10))
    expected = [index_map[slot] if slot >= 0 and index_map[slot] > 0 else -1 for slot in slots]
    assert map_slots(np.array(slots, np.int32), np.array(index_map)).tolist() == expected


def test_a_page_that_the_window_pool_has_partly_freed_is_not_held():
    index_map = np.zeros(16, np.int32)
    index_map[4:12] = np.arange(20, 28)
    index_map[8:10] = 0  # the window has passed tokens 4 and 5 of the request
    assert page_ids(map_slots(np.arange(4, 12), index_map), 4).tolist() == [5, -1]


def test_a_slot_that_the_map_does_not_have_is_refused():
    with pytest.raises(BlockIdError, match="slot 16 has no entry in an index map of 16"):
        map_slots([3, 16], np.zeros(16, np.int32))


# -- states -----------------------------------------------------------------------------------------------


def test_a_state_indexed_by_request_is_kept_at_its_last_boundary():
    assert state_ids(3, 5).tolist() == [-1, -1, 5]
    assert state_ids(1, 0).tolist() == [0]
    assert state_ids(0, 5).tolist() == []


@pytest.mark.parametrize(
    ("slot", "message"), [(0, "0 is one of 1 reserved dummies"), (-1, "slot must be 0, 1, ..., got -1")]
)
def test_a_slot_that_holds_no_state_is_refused(slot, message):
    with pytest.raises(BlockIdError, match=message):
        state_ids(2, slot, num_reserved=1)


@given(slots=st.lists(st.integers(1, 90), unique=True, max_size=8), num_drafts=st.integers(0, 4))
def test_the_last_slots_of_a_request_hold_drafts(slots, num_drafts):
    spec = MambaSpec(16, ((4,),), (jnp.float32,), num_speculative_blocks=num_drafts)
    if len(slots) <= num_drafts:
        with pytest.raises(BlockIdError, match=f"{num_drafts} speculative blocks.*got {len(slots)}"):
            split_drafts(slots, spec)
        return
    snapshots, drafts = split_drafts(slots, spec)
    assert [*snapshots, *drafts] == slots
    assert len(drafts) == num_drafts


def test_a_table_has_none_where_there_is_no_block():
    assert block_table(np.array([-1, 0, 7], np.int32)) == [None, 0, 7]


# -- two pools, an index map and a pool of states ---------------------------------------------------------

PAGE, WINDOW, STATE_TOKENS = 4, 6, 8
FULL_PAGES, WINDOW_PAGES, STATES = 9, 5, 4
GROUPS = {
    "full.0": (FullAttentionSpec(PAGE, 2, 8, jnp.bfloat16), FULL_PAGES),
    "swa.0": (SlidingWindowSpec(PAGE, 1, 8, jnp.bfloat16, WINDOW), WINDOW_PAGES),
    "ssm.0": (
        MambaSpec(STATE_TOKENS, ((6, 3), (2, 4, 4)), (jnp.bfloat16, jnp.float32), num_speculative_blocks=1),
        STATES,
    ),
}
CONFIG = KVCacheConfig(
    tuple(KVCacheGroupSpec((name,), spec, count) for name, (spec, count) in GROUPS.items())
)
SHAPES = {
    "full.0": jax.ShapeDtypeStruct((FULL_PAGES, PAGE, 2, 2, 8), jnp.bfloat16),
    "swa.0": jax.ShapeDtypeStruct((WINDOW_PAGES, PAGE, 1, 2, 8), jnp.bfloat16),
    "ssm.0": [
        jax.ShapeDtypeStruct((STATES, 6, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((STATES, 2, 4, 4), jnp.float32),
    ],
}


@dataclass
class Stack:
    """What a stack such as sglang-jax keeps; page 0 and slot 0 take what padding writes.

    ``index_map`` is by token slot of the full pool; ``state_of`` and ``draft_of`` are by request row.
    """

    req_to_token: np.ndarray
    index_map: np.ndarray
    state_of: np.ndarray
    draft_of: np.ndarray

    @classmethod
    def empty(cls):
        return cls(
            np.zeros((3, 32), np.int32),
            np.zeros(FULL_PAGES * PAGE, np.int32),
            np.zeros(3, np.int32),
            np.zeros(3, np.int32),
        )

    def give(self, row, full_pages, window_pages, state):
        """A request of ``len(full_pages)`` pages; ``window_pages`` are those of its last tokens."""
        full = np.array(slots_of(full_pages, PAGE))
        self.req_to_token[row, : full.size] = full
        held = np.array(slots_of(window_pages, PAGE))
        self.index_map[full] = 0
        self.index_map[full[full.size - held.size :]] = held
        self.state_of[row], self.draft_of[row] = state

    def ids(self, row, num_tokens):
        """Block ids of a request's first ``num_tokens`` tokens in all groups."""
        slots = self.req_to_token[row, :num_tokens]
        snapshots, _ = split_drafts([self.state_of[row], self.draft_of[row]], GROUPS["ssm.0"][0])
        return [
            page_ids(slots, PAGE, num_reserved=1),
            page_ids(map_slots(slots, self.index_map), PAGE, num_reserved=1),
            state_ids(num_tokens // STATE_TOKENS, snapshots[-1], num_reserved=1),
        ]


def test_a_request_leaves_all_pools_and_comes_back_elsewhere():
    """A request of 16 tokens: pages, window pages and state go out, others take them, all comes back."""
    num_tokens = 16
    stack, caches = Stack.empty(), random_caches(SHAPES, seed=5)
    stack.give(0, full_pages=[3, 1, 8, 2], window_pages=[4, 2], state=(2, 3))
    before = numpy_copy(caches)
    with HostPool(1 << 16) as pool:
        transfer = BlockTransfer(canonicalize(caches, CONFIG), pool)
        out = stack.ids(0, num_tokens)
        assert [ids.tolist() for ids in out] == [[3, 1, 8, 2], [-1, -1, 4, 2], [-1, 2]]
        slots = [transfer.reserve(group, len(ids)).keep() for group, ids in enumerate(out)]
        for group, ids in enumerate(out):
            assert transfer.offload(caches, group, ids, slots[group]).wait().error is None

        caches = jax.tree.map(jnp.zeros_like, random_caches(SHAPES, seed=6))  # another request's content
        stack.give(0, full_pages=[3, 1], window_pages=[4], state=(2, 3))
        stack.give(1, full_pages=[7, 6, 5, 4], window_pages=[1, 3], state=(1, 0))
        host = numpy_copy(caches)
        into = stack.ids(1, num_tokens)
        for group, ids in enumerate(into):
            caches, ticket = transfer.restore(caches, group, ids, slots[group])
            assert ticket.wait().error is None
        for chunks in slots:
            transfer.release(chunks)

    host["full.0"][[7, 6, 5, 4]] = before["full.0"][[3, 1, 8, 2]]
    host["swa.0"][[1, 3]] = before["swa.0"][[4, 2]]
    for state, was in zip(host["ssm.0"], before["ssm.0"], strict=True):
        state[1] = was[2]
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(caches), jax.tree.leaves(host), strict=True
    ):
        assert_same_bytes(found, expected, jax.tree_util.keystr(path))


def test_a_request_that_holds_nothing_is_refused_not_moved():
    stack = Stack.empty()
    with pytest.raises(BlockIdError, match="not one page"):
        stack.ids(2, 16)  # its row of req_to_token is all zeros
    stack.give(2, full_pages=[3, 1, 8, 2], window_pages=[4, 2], state=(0, 0))
    with pytest.raises(BlockIdError, match="0 is one of 1 reserved dummies"):
        stack.ids(2, 16)
