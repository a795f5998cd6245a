"""The reference model of the cache, by hand: others are held to what it says, so it is looked at first."""

from __future__ import annotations

import numpy as np
import pytest
from cache_model import CacheModel, Contents, Layer, Question

FULL = Layer("full", 2, 4)
WINDOW = Layer("window", 2, 4, size=6, sinks=1)
LOCAL = Layer("local", 2, 4, size=8)
STATE = Layer("state", 4, 4)


class Sequence:
    """24 tokens of a model, of which chunks are stored."""

    def __init__(self, *layers, tokens_per_hash=4):
        self.model = CacheModel(layers, tokens_per_hash)
        self.ids = self.model.extend(np.zeros(0, np.int64), 24)

    def store(self, layer, *ends):
        """Whole chunks and tails, by what names them."""
        self.model.stored([(layer, int(self.ids[end - 1])) for end in ends])

    def drop(self, layer, end):
        self.model.dropped([(layer, int(self.ids[end - 1]))])

    def hit(self, limit=23, known=0, **options):
        hashed = 24 - 24 % self.model.tokens_per_hash
        return self.model.longest_hit(Question(self.ids, known, limit, hashed), **options)


def test_sequences_share_values_exactly_as_far_as_they_share_tokens():
    cached = Sequence(FULL)
    other = cached.model.extend(cached.ids[:7], 5)
    first, second = (Contents([FULL], ids).tokens[0] for ids in (cached.ids, other))
    assert np.array_equal(first[:7], second[:7])
    assert not np.isin(second[7:], first).any()


def test_what_a_draft_layer_leaves_depends_on_the_next_token():
    cached = Sequence(FULL)
    other = cached.model.extend(cached.ids[:7], 5)
    draft = Layer("full", 2, 4, draft=True)
    first, second = (Contents([draft], ids).tokens[0] for ids in (cached.ids, other))
    assert np.array_equal(first[:6], second[:6])
    assert first[6] != second[6]


def test_blocks_are_the_tokens_of_a_layer_and_for_a_state_its_end():
    contents = Contents([FULL, STATE], np.arange(1, 8))
    assert contents.blocks[0].tolist() == contents.tokens[0][:6].reshape(3, 2).tolist()
    assert contents.blocks[1].tolist() == [[int(contents.tokens[1][3]), 4]]


@pytest.mark.parametrize(
    ("layer", "position", "first"),
    [
        (FULL, 9, 0),
        (WINDOW, 9, 4),
        (WINDOW, 3, 0),
        (LOCAL, 9, 8),
        (LOCAL, 16, 16),
        (STATE, 9, 8),
        (STATE, 0, 0),
    ],
)
def test_a_token_reads_from_the_first_that_its_layer_sees(layer, position, first):
    assert layer.first_read(position) == first
    assert layer.first_reads(np.array([position])).tolist() == [first]


def test_full_attention_is_served_up_to_the_first_chunk_that_is_missing():
    cached = Sequence(FULL)
    cached.store(0, 4, 8, 16)
    assert cached.hit() == 8
    assert cached.hit(limit=7) == 4
    assert cached.hit(known=12) == 16
    cached.drop(0, 4)
    assert cached.hit() == 0
    assert cached.hit(ever=True) == 8


def test_window_needs_its_last_tokens_and_its_sinks():
    cached = Sequence(WINDOW)
    cached.store(0, 12, 16)
    assert cached.hit() == 0, "the sinks are missing"
    assert cached.hit(known=2) == 16, "the sinks are known"
    cached.store(0, 4)
    assert cached.hit() == 16, "the token at 16 reads those from 11 on"
    assert cached.hit(limit=15) == 4, "the token at 12 reads chunk [4, 8) too"


def test_chunked_local_attention_needs_nothing_at_the_start_of_a_chunk():
    cached = Sequence(LOCAL)
    cached.store(0, 20)
    assert cached.hit() == 20
    assert cached.hit(limit=19) == 16
    assert cached.hit(limit=15) == 8


def test_state_needs_the_last_chunk_alone_and_all_layers_must_agree():
    cached = Sequence(STATE, FULL)
    cached.store(0, 8, 16)
    cached.store(1, 4, 8, 12)
    assert cached.hit() == 8
    cached.model.forget_all()
    assert cached.hit(ever=True) == 0


def test_tail_continues_a_hit_where_every_layer_has_one():
    cached = Sequence(STATE, FULL, tokens_per_hash=2)
    cached.store(0, 8, 10)
    cached.store(1, 4, 8)
    assert cached.hit() == 8
    cached.store(1, 10)
    assert cached.hit() == 10
    assert cached.hit(limit=9) == 8


def test_chunk_of_a_draft_layer_counts_once_the_link_behind_it_is_known():
    cached = Sequence(Layer("full", 2, 4, draft=True))
    cached.store(0, 8, 12)
    assert cached.hit() == 8, "12 names the chunk that ends at 8"
    assert cached.model.longest_hit(Question(cached.ids, 0, 9, 8)) == 4


def test_missing_are_chunks_that_were_computed_and_have_no_excuse():
    cached = Sequence(FULL)
    model, ids = cached.model, cached.ids
    assert model.missing(0, ids, 13) == []
    model.computed(ids[:13])
    names = [(0, int(ids[end - 1])) for end in (4, 8, 12)]
    assert model.missing(0, ids, 13) == names
    model.stored(names[:1])
    model.excused(names[1:2])
    assert model.missing(0, ids, 13) == names[2:]
    assert model.missing(0, ids, 11) == []


def test_chunk_of_a_window_is_missed_only_where_an_aligned_boundary_reads_it():
    cached = Sequence(Layer("window", 2, 2, size=3), Layer("full", 2, 8))
    model, ids = cached.model, cached.ids
    model.computed(ids)
    assert model.missing(0, ids, 16) == [(0, int(ids[7])), (0, int(ids[15]))]
