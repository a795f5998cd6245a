"""Caches that MaxText's ``KVCache`` and ``MlaKVCache`` allocate: any order, quantized, on a mesh."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from moving import check_moves, dense, paged

from jaxkv import KVCacheConfig, KVCacheGroupSpec, LayoutHint, MambaSpec
from jaxkv.adapters import describe_dense

REASON = "MaxText is not installed; make test-families installs it"
kvcache = pytest.importorskip("maxtext.inference.kvcache", reason=REASON)
nnx = pytest.importorskip("flax.nnx", reason=REASON)
linen = pytest.importorskip("flax.linen", reason=REASON)

BLOCK = 8
OPTIONS = {
    "max_prefill_length": 16,
    "max_target_length": 40,
    "batch": 4,
    "key_seq_len": 16,
    "value_seq_len": 16,
    "key_heads": 4,
    "value_heads": 4,
    "key_head_size": 8,
    "value_head_size": 8,
    "dtype": jnp.bfloat16,
    "model_mode": "autoregressive",
}
DEFAULT_ORDER = (1, 2, 0, 3)
WHOLE = ("cache_heads_none", "cache_sequence", "cache_kv", "cache_scale_sequence", "cache_scale_kv")
BY_BATCH = ("cache_batch_prefill", "cache_batch", "cache_scale_batch")


def allocate(kind=None, **options):
    with nnx.use_eager_sharding(False):
        return (kind or kvcache.KVCache)(**OPTIONS | options)


def leaves_of(cache):
    return nnx.to_pure_dict(nnx.state(cache, nnx.Cache))


def check_rows(cache, orders, num_data_shards=1):
    """Rows of both caches of a layer move; ``orders`` are those of prefill and autoregressive cache."""
    for stage, axis_order in zip(("prefill", "ar"), orders, strict=True):
        leaves = {name: leaf for name, leaf in leaves_of(cache).items() if f"_{stage}_" in name}
        names = [name for name in leaves if name.startswith(f"cached_{stage}_") and leaves[name].ndim == 4]
        names.append(f"cache_{stage}_segment_id")
        found = describe_dense({stage: leaves}, BLOCK, token_leaves=names, axis_order=axis_order)
        kv_caches, rest = found.split({stage: leaves})
        assert not set(rest[stage]) - {"cache_ar_index", "cached_ar_lengths"}
        assert found.num_rows == OPTIONS["batch"] // num_data_shards
        # Segment ids are [batch, token] whatever the order of the others.
        orders_of_leaves = [axis_order if leaf.ndim == 4 else (0, 1) for leaf in jax.tree.leaves(kv_caches)]
        where = {stage: [dense(BLOCK, order) for order in orders_of_leaves]}
        check_moves(kv_caches, found.config, found.hints, where, num_data_shards=num_data_shards)


@pytest.mark.parametrize(
    "orders",
    [(DEFAULT_ORDER, DEFAULT_ORDER), ((0, 2, 1, 3), (2, 0, 1, 3)), ((0, 1, 2, 3), (1, 2, 0, 3))],
)
def test_rows_move_in_any_axis_order(orders):
    prefill, autoregressive = orders
    cache = allocate(prefill_cache_axis_order=prefill, ar_cache_axis_order=autoregressive)
    check_rows(cache, orders)


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("axis", ["heads_and_dkv", "dkv"])
def test_quantized_rows_move_with_their_scales(dtype, axis):
    options = SimpleNamespace(quantize_kvcache=True, kv_quant_axis=axis, kv_quant_dtype=dtype)
    cache = allocate(kv_quant=kvcache.KVQuant(options))
    names = leaves_of(cache)
    assert names["cached_ar_key"].dtype.name == {"fp8": "float8_e4m3fn"}.get(dtype, dtype)
    assert names["cached_ar_key_scale"].ndim == 4
    check_rows(cache, (DEFAULT_ORDER, DEFAULT_ORDER))


def test_rows_of_latent_attention_move():
    cache = allocate(kvcache.MlaKVCache, key_heads=1, value_heads=1, key_head_size=12)
    check_rows(cache, (DEFAULT_ORDER, DEFAULT_ORDER))


def test_states_of_a_gated_delta_net_move():
    leaves = leaves_of(allocate(is_gdn=True, conv_kernel_size=4, conv_dim=24))
    conv, state = leaves["cached_prefill_value"], leaves["cached_prefill_key"]
    spec = MambaSpec(BLOCK, (conv.shape[1:], state.shape[1:]), (conv.dtype, state.dtype))
    config = KVCacheConfig((KVCacheGroupSpec(("gdn",), spec, OPTIONS["batch"]),))
    hints = {"gdn": LayoutHint(block_axis=0)}  # there may be as many heads as rows
    check_moves({"gdn": [conv, state]}, config, hints, {"gdn": paged()})


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("num_data_shards", [1, 2])
def test_rows_move_on_a_mesh(quantized, num_data_shards):
    """Heads are split, as by MaxText's own rules, whole scales beside them; then the batch as well."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((num_data_shards, 4), ("data", "tensor"), axis_types=axis_types)
    rules = [("cache_heads", "tensor"), ("cache_scale_heads", None), *((name, None) for name in WHOLE)]
    rules += [(name, "data") for name in BY_BATCH]
    options = SimpleNamespace(quantize_kvcache=True, kv_quant_axis="dkv", kv_quant_dtype="int8")
    with jax.set_mesh(mesh), linen.logical_axis_rules(rules):
        cache = kvcache.KVCache(**OPTIONS, kv_quant=kvcache.KVQuant(options) if quantized else None)
    held = cache.cached_ar_key.get_value().addressable_shards[0].data.shape
    assert held == (24, 1, OPTIONS["batch"] // num_data_shards, 8)
    check_rows(cache, (DEFAULT_ORDER, DEFAULT_ORDER), num_data_shards=num_data_shards)
