"""Requests of a decoder with dense caches go to the host and come back, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from dense_model import BLOCK_SIZE, LAYERS, WINDOWS, Batch

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import DenseCaches, describe_dense, set_row
from jaxkv.testing import assert_same_bytes, numpy_copy

RNG = np.random.default_rng(7)
REQUEST, OTHER, NEIGHBOUR = (RNG.integers(0, 19, 44).tolist() for _ in range(3))


@pytest.fixture
def pool():
    with HostPool(1 << 20) as pool:
        yield pool


@dataclass
class Host:
    """Blocks of one request in a host pool, by group and index, and the way there and back."""

    batch: Batch
    dense: DenseCaches
    transfer: BlockTransfer
    slots: dict = field(default_factory=dict)

    @classmethod
    def of(cls, batch, pool):
        dense = describe_dense(batch.cache, BLOCK_SIZE, windows=WINDOWS)
        kv_caches, _ = dense.split(batch.cache)
        return cls(batch, dense, BlockTransfer(canonicalize(kv_caches, dense.config, dense.hints), pool))

    @property
    def groups(self):
        return range(len(self.dense.config.groups))

    def store_new_block(self, row, num_tokens):
        """Offload the block that token ``num_tokens`` completes, as long as nothing has overwritten it."""
        if num_tokens % BLOCK_SIZE:
            return
        kv_caches, _ = self.dense.split(self.batch.cache)
        for group in self.groups:
            tokens = range(num_tokens - BLOCK_SIZE, num_tokens)
            ids = self.dense.held_blocks(group, row, tokens, num_tokens)
            slots = self.transfer.reserve(group, 1).keep()
            self.slots[group, num_tokens // BLOCK_SIZE - 1] = slots[0]
            self.transfer.offload(kv_caches, group, ids, slots).wait()

    def restore(self, row, num_tokens, *, clear_positions=True):
        """Give ``row`` the first ``num_tokens`` tokens of the request."""
        kv_caches, rest = self.dense.split(self.batch.cache)
        if clear_positions:
            kv_caches = set_row(kv_caches, row, positions=0)
        for group in self.groups:
            ids = self.dense.needed_blocks(group, row, num_tokens)
            slots = [self.slots[group, index] for index in range(len(ids))]
            kv_caches, ticket = self.transfer.restore(kv_caches, group, ids, slots)
            assert ticket.wait().error is None
        self.batch.cache = self.dense.join(kv_caches, set_row(rest, row, end_index=num_tokens))

    def release(self):
        self.transfer.release(list(self.slots.values()))


def rows_of(cache, row):
    return jax.tree.map(lambda leaf: leaf[row], numpy_copy(cache))


def same_logits(found, expected):
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert_same_bytes(left, right, f"logits {index}")


@pytest.mark.parametrize("first_position", [0, 100])
@pytest.mark.parametrize("back_to", [1, 2])
@pytest.mark.parametrize("boundary", [4, 8, 12, 24, 36])
def test_decoding_goes_on_as_if_the_request_had_never_left(pool, boundary, back_to, first_position):
    expected = Batch().feed(1, REQUEST, first_position)
    batch = Batch()
    host = Host.of(batch, pool)
    before = batch.feed(
        1, REQUEST[:boundary], first_position, after_token=lambda count: host.store_new_block(1, count)
    )
    same_logits(before, expected[:boundary])

    batch.begin(1)
    for row in (1, 2):
        # Its positions, at the slots a window leaves behind, lie inside the window of REQUEST.
        batch.feed(row, OTHER, first_position + boundary - 4)
        batch.begin(row)
    batch.feed(0, NEIGHBOUR[:30])
    untouched = rows_of(batch.cache, 0)
    host.restore(back_to, boundary)
    for name, leaf in rows_of(batch.cache, 0).items():
        for part, array in leaf.items():
            assert_same_bytes(array, untouched[name][part], f"row 0 of {name}[{part}]")

    same_logits(batch.feed(back_to, REQUEST[boundary:], first_position + boundary), expected[boundary:])
    same_logits(batch.feed(0, NEIGHBOUR[30:], 30), Batch().feed(0, NEIGHBOUR)[30:])
    host.release()


def test_positions_that_another_request_left_in_the_row_would_change_the_logits(pool):
    boundary = 24
    expected = Batch().feed(1, REQUEST)
    batch = Batch()
    host = Host.of(batch, pool)
    batch.feed(1, REQUEST[:boundary], after_token=lambda count: host.store_new_block(1, count))
    batch.begin(1)
    batch.feed(1, OTHER, boundary - 4)
    host.restore(1, boundary, clear_positions=False)
    found = batch.feed(1, REQUEST[boundary:], boundary)
    assert any((left != right).any() for left, right in zip(found, expected[boundary:], strict=True))
    host.release()


def test_a_row_that_rolled_on_gives_up_what_it_has_overwritten(pool):
    batch = Batch()
    host = Host.of(batch, pool)
    batch.feed(1, REQUEST[:25])
    held = {group: host.dense.held_blocks(group, 1, range(24), 25).tolist() for group in host.groups}
    of_layer = {
        layer: held[group]
        for group, spec in enumerate(host.dense.config.groups)
        for layer in spec.layer_names
    }
    # 8 slots hold tokens 17 to 24, 16 slots tokens 9 to 24, 48 slots all; a row has slots / 4 blocks.
    assert of_layer["layer_0"] == [-1, -1, -1, -1, -1, 3]
    assert of_layer["layer_3"] == [-1, -1, -1, 7, 4, 5]
    assert of_layer["layer_1"] == [12, 13, 14, 15, 16, 17]
    assert {LAYERS[layer].slots for layer in ("layer_0", "layer_3", "layer_1")} == {8, 16, 48}
