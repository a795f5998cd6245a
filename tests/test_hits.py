"""The longest hit equals brute force over what each kind of layer reads."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.hits import HitGroup, first_needed_block, longest_hit, required_chunks
from jaxkv.spec import FullAttentionSpec, MambaSpec, SlidingWindowSpec

MAX_TOKENS = 96


def full(block_size=4):
    return FullAttentionSpec(block_size, 1, 8, jnp.float32)


def window(size, block_size=4):
    return SlidingWindowSpec(block_size, 1, 8, jnp.float32, sliding_window=size)


def mamba(block_size=4):
    return MambaSpec(block_size, ((2,),), (jnp.float32,))


def tokens_read_next(spec, boundary):
    """Tokens whose cache the token at position ``boundary`` reads; a state stands for the last one."""
    if isinstance(spec, FullAttentionSpec):
        return set(range(boundary))
    if isinstance(spec, SlidingWindowSpec):
        return {t for t in range(boundary) if boundary - t < spec.sliding_window}
    return set(range(boundary)[-1:])


def servable(group, index, boundary, known, table):
    chunks = {t // group.tokens_per_chunk for t in tokens_read_next(group.spec, boundary)}
    return all((index, c) in table for c in chunks if (c + 1) * group.tokens_per_chunk > known)


def brute_force_hit(groups, known, limit, alignment, table):
    boundaries = (b for b in range(0, limit + 1, alignment) if b > known)
    good = (
        b for b in boundaries if all(servable(group, i, b, known, table) for i, group in enumerate(groups))
    )
    return max(good, default=known)


@st.composite
def hit_questions(draw):
    alignment = draw(st.sampled_from([4, 8, 12]))
    sizes = [size for size in (1, 2, 4, 6, 8, 12) if alignment % size == 0]
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        chunk = draw(st.sampled_from(sizes))
        block = draw(st.sampled_from([size for size in sizes if chunk % size == 0]))
        kind = draw(st.sampled_from([full(block), window(draw(st.integers(1, 40)), block), mamba(block)]))
        groups.append(HitGroup(kind, chunk))
    absent = draw(
        st.sets(st.tuples(st.integers(0, len(groups) - 1), st.integers(0, MAX_TOKENS)), max_size=25)
    )
    table = {(i, c) for i, g in enumerate(groups) for c in range(MAX_TOKENS // g.tokens_per_chunk)} - absent
    known = alignment * draw(st.integers(0, MAX_TOKENS // alignment))
    return groups, known, draw(st.integers(0, MAX_TOKENS)), alignment, table


@settings(max_examples=1500)
@given(hit_questions())
def test_longest_hit_is_the_largest_boundary_every_group_can_serve(question):
    groups, known, limit, alignment, table = question
    hit = longest_hit(groups, known, limit, alignment, lambda group, chunk: (group, chunk) in table)
    assert hit == brute_force_hit(groups, known, limit, alignment, table)


@settings(max_examples=300)
@given(hit_questions())
def test_longest_hit_never_asks_for_chunks_held_already_or_past_the_limit(question):
    groups, known, limit, alignment, table = question
    asked = []

    def present(group, chunk):
        asked.append((group, chunk))
        return (group, chunk) in table

    longest_hit(groups, known, limit, alignment, present)
    for group, chunk in asked:
        size = groups[group].tokens_per_chunk
        assert known < (chunk + 1) * size <= limit


@pytest.mark.parametrize(
    ("spec", "tokens_per_chunk", "boundary", "chunks"),
    [
        (full(), 4, 0, range(0)),
        (full(), 4, 12, range(3)),
        (full(), 8, 16, range(2)),
        (window(1), 4, 12, range(3, 3)),
        (window(2), 4, 12, range(2, 3)),
        (window(5), 4, 12, range(2, 3)),
        (window(6), 4, 12, range(1, 3)),
        (window(9), 4, 12, range(1, 3)),
        (window(10), 4, 12, range(3)),
        (window(100), 4, 12, range(3)),
        (window(5), 4, 0, range(0)),
        (mamba(), 4, 0, range(0)),
        (mamba(), 4, 4, range(1)),
        (mamba(), 4, 12, range(2, 3)),
        (mamba(), 8, 16, range(1, 2)),
    ],
)
def test_required_chunks_are_those_the_next_token_reads(spec, tokens_per_chunk, boundary, chunks):
    assert list(required_chunks(HitGroup(spec, tokens_per_chunk), boundary)) == list(chunks)


@given(
    st.sampled_from([full, window, mamba]), st.integers(1, 8), st.integers(1, 40), st.integers(0, MAX_TOKENS)
)
def test_first_needed_block_is_the_first_any_later_token_reads(kind, block_size, size, computed):
    spec = window(size, block_size) if kind is window else kind(block_size)
    first = first_needed_block(spec, computed)
    read = {t // block_size for n in range(computed, computed + 50) for t in tokens_read_next(spec, n)}
    blocks_now = {b for b in read if b * block_size < computed}
    # A window that begins right behind the computed tokens reads none of the blocks held now.
    assert first == min(blocks_now, default=computed // block_size)


def test_hit_of_full_and_window_groups_stops_before_a_hole_in_the_window():
    groups = [HitGroup(full(), 4), HitGroup(window(6), 4)]
    table = {(0, c) for c in range(6)} | {(1, c) for c in (0, 1, 2, 4, 5)}
    assert longest_hit(groups, 0, 24, 4, lambda g, c: (g, c) in table) == 24
    table.discard((1, 4))
    assert longest_hit(groups, 0, 24, 4, lambda g, c: (g, c) in table) == 12


def test_hit_of_a_state_group_ends_where_a_state_was_kept():
    groups = [HitGroup(full(), 4), HitGroup(mamba(), 4)]
    table = {(0, c) for c in range(6)} | {(1, 2)}
    assert longest_hit(groups, 0, 24, 4, lambda g, c: (g, c) in table) == 12


def test_hit_falls_back_to_what_is_known_when_nothing_more_is_present():
    assert longest_hit([HitGroup(full(), 4)], 8, 24, 4, lambda g, c: False) == 8
    assert longest_hit([HitGroup(full(), 4)], 8, 6, 4, lambda g, c: True) == 8
