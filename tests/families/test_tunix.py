"""Caches of tunix: Gemma 4 with local layers that roll, and the model decoding on after its cache left."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moving import check_moves, dense
from packages import hollow, require

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import describe_dense, set_row

for package in ("flax", "jaxtyping", "tunix"):
    require(package)

# tunix imports jax.experimental.shard_map, and asks flax for what it calls by other names now.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

B, L, WINDOW, BLOCK = 3, 64, 16, 8
ROLLING = ("layer_0", "layer_2")


@pytest.fixture(scope="module")
def gemma4():
    with hollow("tunix", "tunix.models.gemma4"):
        yield importlib.import_module("tunix.models.gemma4.model")


@pytest.fixture(scope="module")
def make_model(gemma4):
    nnx = importlib.import_module("flax.nnx")
    kinds = gemma4.AttentionType
    config = gemma4.ModelConfig(
        num_layers=6,
        num_embed=32,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        sliding_window_size=WINDOW,
        global_key_size=32,
        attention_pattern=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        frac_shared_layers=2 / 6,
    )

    def make(**changes):
        return gemma4.Gemma4(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))

    return make


@pytest.mark.parametrize("rolls", [False, True])
def test_rows_move(make_model, rolls):
    cache = make_model(use_sliding_window_kv_cache=rolls).init_cache(B, L, jnp.bfloat16)
    found = describe_dense(cache, BLOCK, windows=dict.fromkeys(ROLLING, WINDOW))
    assert [group.layer_names for group in found.config.groups] == [ROLLING, ("layer_1", "layer_3")]
    assert found.row_slots == (WINDOW if rolls else L, L)
    kv_caches, _ = found.split(cache)
    check_moves(kv_caches, found.config, found.hints, dict.fromkeys(kv_caches, dense(BLOCK)))


@dataclasses.dataclass
class Decoder:
    """A model, its cache, and tokens that are fed to all rows one by one."""

    model: Any
    tokens: Any
    cache: Any

    def __post_init__(self):
        self._step = jax.jit(self._compute)

    def feed(self, indices):
        """Logits behind each of these tokens."""
        logits = []
        for index in indices:
            self.cache, found = self._step(self.cache, self.tokens[:, index : index + 1], index)
            logits.append(np.array(found))
        return logits

    def _compute(self, cache, token, index):
        mask = jnp.broadcast_to(jnp.arange(L) <= index, (B, 1, L))
        logits, cache = self.model(token, jnp.full((B, 1), index), cache, mask)
        return cache, logits


@pytest.mark.parametrize("boundary", [8, 16, 24, 40])
def test_the_model_decodes_on_after_its_cache_left(make_model, boundary):
    """Blocks are stored as they are completed, since rows of local layers roll over."""
    model, behind = make_model(), range(boundary, boundary + 6)
    tokens = np.random.default_rng(0).integers(0, 32, (B, behind.stop))
    straight = Decoder(model, tokens, model.init_cache(B, L, jnp.float32))
    straight.feed(range(boundary))
    expected = straight.feed(behind)

    decoder = Decoder(model, tokens, model.init_cache(B, L, jnp.float32))
    found = describe_dense(decoder.cache, BLOCK, windows=dict.fromkeys(ROLLING, WINDOW))
    kv_caches, _ = found.split(decoder.cache)
    chunks = {(group, row): [] for group in range(len(found.config.groups)) for row in range(B)}
    with HostPool(1 << 22) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, found.config, found.hints), pool)
        for first in range(0, boundary, BLOCK):
            block = range(first, first + BLOCK)
            decoder.feed(block)
            kv_caches, _ = found.split(decoder.cache)
            for (group, row), slots in chunks.items():
                slots.extend(transfer.reserve(group, 1).keep())
                ids = found.held_blocks(group, row, block, num_written=block.stop)
                transfer.offload(kv_caches, group, ids, slots[-1:]).wait()

        kv_caches, rest = found.split(jax.tree.map(jnp.ones_like, decoder.cache))
        for (group, row), slots in chunks.items():
            ids = found.needed_blocks(group, row, boundary)
            kv_caches, _ = transfer.restore(kv_caches, group, ids, slots)
            rest = set_row(rest, row, end_index=boundary)
            transfer.release(slots)
    decoder.cache = found.join(kv_caches, rest)
    for logits, was in zip(decoder.feed(behind), expected, strict=True):
        np.testing.assert_array_equal(logits, was)
