"""Caches of flax NNX modules."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from moving import check_moves, dense

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import describe_dense

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; make test-families installs it")

BATCH, LENGTH, HEADS, FEATURES, BLOCK = 3, 16, 2, 12, 4
LEAVES = ("cached_key", "cached_value")


def make_attention(dtype):
    attention = nnx.MultiHeadAttention(
        HEADS, FEATURES, 8, dtype=dtype, param_dtype=dtype, decode=True, rngs=nnx.Rngs(0)
    )
    attention.init_cache((BATCH, LENGTH, FEATURES), dtype=dtype)
    return attention


def caches_of(attention):
    return {"attention": nnx.to_pure_dict(nnx.state(attention, nnx.Cache))}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_multi_head_attention_move(dtype):
    cache = caches_of(make_attention(dtype))
    found = describe_dense(cache, BLOCK, token_leaves=LEAVES)
    kv_caches, rest = found.split(cache)
    assert list(rest["attention"]) == ["cache_index"]
    assert found.config.groups[0].num_blocks == BATCH * LENGTH // BLOCK
    check_moves(kv_caches, found.config, found.hints, {"attention": dense(BLOCK)})


def test_multi_head_attention_decodes_on_after_its_cache_was_away():
    tokens = jnp.array(np.random.default_rng(0).normal(size=(12, BATCH, 1, FEATURES)), jnp.float32)
    straight = make_attention(jnp.float32)
    expected = [np.array(straight(token)) for token in tokens]
    attention = make_attention(jnp.float32)
    for token in tokens[:8]:
        attention(token)
    cache = caches_of(attention)
    found = describe_dense(cache, BLOCK, token_leaves=LEAVES)
    kv_caches, rest = found.split(cache)
    ids = np.concatenate([found.held_blocks(0, row, range(8), 8) for row in range(BATCH)])
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, found.config, found.hints), pool)
        with transfer.reserve(0, len(ids)) as slots:
            transfer.offload(kv_caches, 0, ids, slots).wait()
            kv_caches = {
                "attention": {name: jnp.full_like(kv_caches["attention"][name], 3) for name in LEAVES}
            }
            kv_caches, _ = transfer.restore(kv_caches, 0, ids, slots)
    nnx.update(attention, found.join(kv_caches, rest)["attention"])
    for token, was in zip(tokens[8:], expected[8:], strict=True):
        np.testing.assert_array_equal(np.array(attention(token)), was)


def test_the_recipe_runs(capsys):
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "flax_nnx.py"
    runpy.run_path(str(recipe), run_name="__main__")
    assert capsys.readouterr().out.endswith("8 tokens are back in other pages, same logits\n")
