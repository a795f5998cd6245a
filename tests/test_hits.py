"""The longest hit equals brute force over what each kind of layer reads."""

import math
from itertools import chain, takewhile

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.hits import HitGroup, longest_hit, longest_tail, missing_chunks, required_chunks, unread_blocks
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

MAX_TOKENS = 96
SIZES = st.integers(1, 40)


def full(block_size=4):
    return FullAttentionSpec(block_size, 1, 8, jnp.float32)


def window(size, block_size=4, sinks=0):
    return SlidingWindowSpec(block_size, 1, 8, jnp.float32, sliding_window=size, sink_len=sinks)


def local(size, block_size=4):
    return ChunkedLocalAttentionSpec(block_size, 1, 8, jnp.float32, attention_chunk_size=size)


def latent(block_size=4):
    return MLAAttentionSpec(block_size, 8, jnp.float32)


def mamba(block_size=4):
    return MambaSpec(block_size, ((2,),), (jnp.float32,))


@st.composite
def specs(draw, block_size):
    kind = draw(st.sampled_from([full, latent, mamba, window, local]))
    if kind is window:
        return window(draw(SIZES), block_size, draw(st.sampled_from([0, 1, 5, 8, 13, 30])))
    return local(draw(SIZES), block_size) if kind is local else kind(block_size)


class Table:
    """A store that holds the chunks ``(group, index)`` of a set; remembers what it was asked for."""

    def __init__(self, held, tails=()):
        self.held = held
        self.tails = set(tails)
        self.asked = []

    def count_leading(self, group, chunks):
        self.asked.extend((group, chunk) for chunk in chunks)
        return sum(1 for _ in takewhile(lambda chunk: (group, chunk) in self.held, chunks))

    def count_trailing(self, group, chunks):
        return self.count_leading(group, chunks[::-1])

    def has_tail(self, group, end_tokens):
        return (group, end_tokens) in self.tails


def flat(ranges):
    return tuple(chain.from_iterable(ranges))


def tokens_read_next(spec, boundary):
    """Tokens whose cache the token at position ``boundary`` reads; a state stands for the last one."""
    if isinstance(spec, SlidingWindowSpec):
        return {t for t in range(boundary) if boundary - t < spec.sliding_window or t < spec.sink_len}
    if isinstance(spec, ChunkedLocalAttentionSpec):
        size = spec.attention_chunk_size
        return {t for t in range(boundary) if t // size == boundary // size}
    if isinstance(spec, MambaSpec):
        return set(range(boundary)[-1:])
    return set(range(boundary))


def servable(group, index, boundary, known, table):
    read = tokens_read_next(group.spec, boundary)
    chunks = {t // group.tokens_per_chunk for t in read if t >= known}
    return all((index, c) in table for c in chunks)


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
        groups.append(HitGroup(draw(specs(block)), chunk))
    absent = draw(
        st.sets(st.tuples(st.integers(0, len(groups) - 1), st.integers(0, MAX_TOKENS)), max_size=25)
    )
    table = {(i, c) for i, g in enumerate(groups) for c in range(MAX_TOKENS // g.tokens_per_chunk)} - absent
    device_alignment = math.lcm(*(group.spec.block_size for group in groups))
    known = device_alignment * draw(st.integers(0, MAX_TOKENS // device_alignment))
    return groups, known, draw(st.integers(0, MAX_TOKENS)), alignment, table


@settings(max_examples=1000)
@given(hit_questions())
def test_longest_hit_is_the_largest_boundary_every_group_can_serve(question):
    groups, known, limit, alignment, table = question
    hit = longest_hit(groups, known, limit, alignment, Table(table))
    assert hit == brute_force_hit(groups, known, limit, alignment, table)


@settings(max_examples=300)
@given(hit_questions())
def test_longest_hit_never_asks_for_chunks_held_already_or_past_the_limit(question):
    groups, known, limit, alignment, table = question
    presence = Table(table)
    longest_hit(groups, known, limit, alignment, presence)
    for group, chunk in presence.asked:
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
        (window(5, sinks=1), 4, 24, [0, 5]),
        (window(5, sinks=4), 4, 24, [0, 5]),
        (window(5, sinks=5), 4, 24, [0, 1, 5]),
        (window(5, sinks=5), 8, 24, [0, 2]),
        (window(5, sinks=9), 8, 24, [0, 1, 2]),
        (window(1, sinks=4), 4, 24, [0]),
        (window(5, sinks=30), 4, 24, range(6)),
        (window(9, sinks=5), 4, 4, [0]),
        (local(16), 4, 0, []),
        (local(16), 4, 12, range(3)),
        (local(16), 4, 16, []),
        (local(16), 4, 20, [4]),
        (local(16), 8, 24, [2]),
        (local(10), 4, 12, [2]),
        (local(10), 4, 20, []),
        (local(10), 4, 28, [5, 6]),
        (local(10), 8, 24, [2]),
        (local(3), 4, 20, [4]),
        (local(4), 4, 20, []),
        (local(1), 4, 20, []),
        (latent(), 4, 12, range(3)),
        (mamba(), 4, 0, range(0)),
        (mamba(), 4, 4, range(1)),
        (mamba(), 4, 12, range(2, 3)),
        (mamba(), 8, 16, range(1, 2)),
    ],
)
def test_required_chunks_are_those_the_next_token_reads(spec, tokens_per_chunk, boundary, chunks):
    assert flat(required_chunks(HitGroup(spec, tokens_per_chunk), boundary)) == tuple(chunks)


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12))
def test_required_chunks_of_any_spec_are_those_the_next_token_reads(data, block_size, blocks, index):
    group = HitGroup(data.draw(specs(block_size)), block_size * blocks)
    boundary = index * group.tokens_per_chunk
    read = {token // group.tokens_per_chunk for token in tokens_read_next(group.spec, boundary)}
    assert flat(required_chunks(group, boundary)) == tuple(sorted(read))


@given(st.data(), st.integers(1, 8), st.integers(0, MAX_TOKENS))
def test_unread_blocks_are_those_no_later_token_reads(data, block_size, computed):
    spec = data.draw(specs(block_size))
    later = range(computed, computed + 50)
    read = {token // block_size for position in later for token in tokens_read_next(spec, position)}
    # The block that tokens are still written to is kept, though a window of one token reads none of it.
    complete = computed // block_size
    assert set(unread_blocks(spec, computed)) == set(range(complete)) - read


def test_hit_of_full_and_window_groups_stops_before_a_hole_in_the_window():
    groups = [HitGroup(full(), 4), HitGroup(window(6), 4)]
    table = {(0, c) for c in range(6)} | {(1, c) for c in (0, 1, 2, 4, 5)}
    assert longest_hit(groups, 0, 24, 4, Table(table)) == 24
    table.discard((1, 4))
    assert longest_hit(groups, 0, 24, 4, Table(table)) == 12


def test_hit_of_a_state_group_ends_where_a_state_was_kept():
    groups = [HitGroup(full(), 4), HitGroup(mamba(), 4)]
    table = {(0, c) for c in range(6)} | {(1, 2)}
    assert longest_hit(groups, 0, 24, 4, Table(table)) == 12


def test_hit_of_a_chunked_local_group_may_be_longer_than_one_it_cannot_serve():
    groups = [HitGroup(full(), 4), HitGroup(local(16), 4)]
    table = {(0, c) for c in range(8)} | {(1, 5)}
    assert longest_hit(groups, 0, 12, 4, Table(table)) == 0
    assert longest_hit(groups, 0, 16, 4, Table(table)) == 16
    assert longest_hit(groups, 0, 32, 4, Table(table)) == 32
    table.discard((0, 7))
    assert longest_hit(groups, 0, 32, 4, Table(table)) == 16
    table.add((1, 4))
    assert longest_hit(groups, 0, 32, 4, Table(table)) == 24


def test_hit_of_a_window_with_sinks_ends_before_a_hole_in_the_sinks():
    groups = [HitGroup(window(6, sinks=7), 4)]
    table = {(0, c) for c in (0, 1, 4, 5)}
    assert longest_hit(groups, 0, 24, 4, Table(table)) == 24
    table.discard((0, 1))
    assert longest_hit(groups, 0, 24, 4, Table(table)) == 4


def test_hit_falls_back_to_what_is_known_when_nothing_more_is_present():
    assert longest_hit([HitGroup(full(), 4)], 8, 24, 4, Table(set())) == 8
    assert longest_hit([HitGroup(full(), 4)], 8, 6, 4, Table({(0, c) for c in range(9)})) == 8


@settings(max_examples=600)
@given(hit_questions(), st.data())
def test_longest_tail_is_the_largest_boundary_all_whole_and_cut_chunks_are_there_for(question, data):
    groups, known, limit, _, table = question
    tails = data.draw(
        st.sets(st.tuples(st.integers(0, len(groups) - 1), st.integers(known, limit)), max_size=30)
        if limit > known
        else st.just(set())
    )

    def servable_cut(boundary):
        for index, group in enumerate(groups):
            size = group.tokens_per_chunk
            read = {t // size for t in tokens_read_next(group.spec, boundary) if t >= known}
            whole = {c for c in read if (c + 1) * size <= boundary}
            if any((index, c) not in table for c in whole):
                return False
            cut_is_read = bool(boundary % size) and boundary // size in read
            if cut_is_read and (index, boundary) not in tails:
                return False
        return True

    good = [boundary for boundary in range(known + 1, limit + 1) if servable_cut(boundary)]
    found = longest_tail(groups, known, range(known + 1, limit + 1), Table(table, tails))
    assert found == max(good, default=None)


def test_chunk_of_which_only_sinks_are_read_is_not_missing_where_the_device_holds_them():
    """At 48 tokens a window of 13 reads 36 to 47 and the 7 sinks; the device holds 16 tokens."""
    group = HitGroup(window(13, 8, sinks=7), 24)
    assert flat(missing_chunks(group, 48, 16)) == (1,)
    assert flat(missing_chunks(group, 48, 0)) == (0, 1)
