"""Caches that gemma's ``Attention`` modules allocate, and a layer that decodes on after its cache left."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moving import check_moves, dense

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import describe_dense, set_row

pytest.importorskip("gemma", reason="gemma is not installed; make test-families installs it")

B, L, BLOCK, WINDOW = 3, 32, 4, 6
MODULES = ("gemma.gm.nn._modules", "gemma.gm.nn.gemma3n._modules", "gemma.gm.nn.gemma4._modules")


@pytest.mark.parametrize("name", MODULES)
def test_rows_move(name):
    attention = importlib.import_module(name).Attention
    cache = {
        "layer_0": attention.init_cache(L, 1, 16, B),
        "layer_1": attention.init_cache(L, 1, 16, B),
        "layer_2": attention.init_cache(L, 2, 32, B),
    }
    found = describe_dense(cache, BLOCK, windows={"layer_0": WINDOW, "layer_1": WINDOW})
    assert [group.layer_names for group in found.config.groups] == [("layer_0", "layer_1"), ("layer_2",)]
    kv_caches, rest = found.split(cache)
    assert {part for layer in rest.values() for part in layer} == {"end_index"}
    check_moves(kv_caches, found.config, found.hints, dict.fromkeys(kv_caches, dense(BLOCK)))


@pytest.fixture
def gemma4(monkeypatch):
    found = importlib.import_module("gemma.gm.nn.gemma4._modules")
    # All it wants of kauldron, whose modules need TensorFlow, is a module that hands on its input.
    identity = SimpleNamespace(Identity=lambda: lambda values: values)
    monkeypatch.setattr(found, "kd", SimpleNamespace(nn=identity))
    return found


def make_step(gemma4, *, is_local):
    """``step(cache, row, index)``: one token of one row, so that its bits do not depend on the row."""
    kind = gemma4.AttentionType.LOCAL_SLIDING if is_local else gemma4.AttentionType.GLOBAL
    layer = gemma4.Attention(
        num_heads=2,
        num_kv_heads=1,
        features=8,
        key_size=16,
        attn_type=kind,
        sliding_window_size=WINDOW if is_local else None,
        rope_proportion=1.0,
    )
    tokens = jnp.array(np.random.default_rng(0).normal(size=(16, 1, 1, 8)), jnp.float32)
    params = layer.init(jax.random.key(0), tokens[0], jnp.zeros((1, 1), jnp.int32), None, jnp.ones((1, 1, 1)))

    def step(cache, row, index):
        of_row = {name: leaf[row : row + 1] for name, leaf in cache.items()}
        place, visible = jnp.full((1, 1), index, jnp.int32), jnp.arange(L)[None, None] <= index
        of_row, out = layer.apply(params, tokens[index], place, of_row, visible)
        return {name: leaf.at[row].set(of_row[name][0]) for name, leaf in cache.items()}, np.array(out)

    return step


@pytest.mark.parametrize("is_local", [False, True])
def test_gemma4_attention_decodes_on_in_another_row(gemma4, is_local):
    """Row 0 leaves after 12 tokens and goes on as row 2; its outputs are those of a request that stayed."""
    step = make_step(gemma4, is_local=is_local)
    cache = gemma4.Attention.init_cache(L, 1, 16, B, jnp.float32)
    for index in range(12):
        cache, _ = step(cache, 0, index)
    expected, straight = [], cache
    for index in range(12, 16):
        straight, out = step(straight, 0, index)
        expected.append(out)

    found = describe_dense({"layer_0": cache}, BLOCK, windows={"layer_0": WINDOW} if is_local else {})
    kv_caches, rest = found.split({"layer_0": cache})
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, found.config, found.hints), pool)
        with transfer.reserve(0, 3) as slots:
            transfer.offload(kv_caches, 0, found.held_blocks(0, 0, range(12), 12), slots).wait()
            kv_caches = {"layer_0": {name: leaf + 5 for name, leaf in kv_caches["layer_0"].items()}}
            kv_caches = set_row(kv_caches, 2, positions=0)
            kv_caches, _ = transfer.restore(kv_caches, 0, found.needed_blocks(0, 2, 12), slots)
    cache = found.join(kv_caches, set_row(rest, 2, end_index=12))["layer_0"]
    for index, was in zip(range(12, 16), expected, strict=True):
        cache, out = step(cache, 2, index)
        np.testing.assert_array_equal(out, was)
