"""Caches that tpu-inference's runner allocates, on a device and on a mesh, and its kernels' other shapes."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moving import check_moves, fill, paged
from packages import hollow, module, require

from jaxkv import (
    BlockTransfer,
    FullAttentionSpec,
    HostPool,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayoutHint,
    MambaSpec,
    MLAAttentionSpec,
    canonicalize,
)
from jaxkv.spec import dtype_bits
from jaxkv.testing import assert_same_bytes, numpy_copy

require("tpu_inference")

NUM_BLOCKS, PAGE = 8, 16
HINT = LayoutHint(block_axis=0)
UNUSED = (
    "sympy",
    *(f"torch{name}" for name in ("", "ax", "ax.ops", "ax.ops.mappings")),
    *(f"vllm{name}" for name in ("", ".envs", ".utils", ".ray", ".ray.lazy_utils")),
    *(f"vllm.v1{name}" for name in ("", ".attention", ".attention.backends", ".attention.backends.registry")),
)


@pytest.fixture(scope="module")
def tpu_inference():
    """Imports a module of ``tpu_inference``; its allocation code calls nothing of what is made up here."""
    given = {name: mock.MagicMock(name=name) for name in UNUSED}
    given["tpu_inference.logger"] = module("tpu_inference.logger", init_logger=logging.getLogger)
    with hollow("tpu_inference", given=given):
        yield lambda name: importlib.import_module(f"tpu_inference.{name}")


@pytest.fixture(scope="module")
def allocator(tpu_inference):
    return tpu_inference("runner.kv_cache")


@pytest.fixture(scope="module")
def make_mesh(tpu_inference):
    names = tpu_inference("layers.common.sharding").MESH_AXIS_NAMES

    def make(data, model):
        sizes = [{"data": data, "model": model}.get(name, 1) for name in names]
        return jax.sharding.Mesh(np.array(jax.devices()[: data * model]).reshape(sizes), names)

    return make


def attention_config(kv_caches, num_heads, head_size, num_blocks=NUM_BLOCKS, copies=1):
    """All layers in one group; a page stores what the array has for a block, head copies once."""
    leaf = next(iter(kv_caches.values()))
    stored = int(np.prod(leaf.shape[1:])) * dtype_bits(leaf.dtype) // 8 // copies
    spec = FullAttentionSpec(PAGE, num_heads, head_size, leaf.dtype, page_size_bytes=stored)
    return KVCacheConfig((KVCacheGroupSpec(tuple(kv_caches), spec, num_blocks),))


def create(allocator, mesh, num_heads, head_size, dtype=jnp.bfloat16):
    layers = ["layer.0", "layer.1"]
    leaves = allocator.create_kv_caches(
        num_blocks=NUM_BLOCKS,
        block_size=PAGE,
        num_kv_heads=num_heads,
        head_size=head_size,
        mesh=mesh,
        layer_names=layers,
        cache_dtype=dtype,
    )
    return dict(zip(layers, leaves, strict=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 80), (4, 128), (8, 64)])
def test_pages_move(allocator, make_mesh, dtype, num_heads, head_size):
    mesh = make_mesh(1, 1)
    kv_caches = create(allocator, mesh, num_heads, head_size, dtype)
    config = attention_config(kv_caches, num_heads, head_size)
    theirs = allocator.get_attention_page_size_bytes(
        mesh, PAGE, num_heads, head_size, np.dtype(dtype).name, False
    )
    assert config.groups[0].spec.page_size_bytes == theirs
    check_moves(kv_caches, config, dict.fromkeys(kv_caches, HINT), dict.fromkeys(kv_caches, paged()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("num_heads", "head_size"), [(4, 128), (8, 64)])
def test_pages_move_on_a_mesh_with_blocks_and_heads_split(allocator, make_mesh, dtype, num_heads, head_size):
    kv_caches = create(allocator, make_mesh(2, 4), num_heads, head_size, dtype)
    config = attention_config(kv_caches, num_heads, head_size, NUM_BLOCKS // 2)
    hints = dict.fromkeys(kv_caches, HINT)
    check_moves(kv_caches, config, hints, dict.fromkeys(kv_caches, paged()), num_data_shards=2)


def test_heads_that_are_copied_for_more_devices_are_stored_once(tpu_inference, allocator, make_mesh):
    """Two heads on four devices: tpu-inference gives each device one, so each head exists twice."""
    num_heads = tpu_inference("utils").get_padded_num_heads(2, 4)
    assert num_heads == 4
    kv_caches = create(allocator, make_mesh(1, 4), num_heads, 128)

    def fill_with_copies(kv_caches):
        def copy_heads(leaf):
            return jax.device_put(jnp.repeat(leaf[:, :, ::2], 2, axis=2), leaf.sharding)

        return jax.tree.map(copy_heads, fill(kv_caches))

    config = attention_config(kv_caches, 2, 128, copies=2)
    hints = dict.fromkeys(kv_caches, LayoutHint(block_axis=0, head_axis=2, head_copies=2))
    check_moves(kv_caches, config, hints, dict.fromkeys(kv_caches, paged()), fill=fill_with_copies)


@pytest.mark.parametrize(
    ("saved_on", "restored_on", "dtype", "hint"),
    [
        (1, 4, jnp.bfloat16, HINT),
        (4, 2, jnp.bfloat16, HINT),
        (2, 1, jnp.bfloat16, HINT),
        (1, 2, jnp.float8_e4m3fn, LayoutHint(block_axis=0, head_axis=2)),
    ],
)
def test_pages_saved_under_one_tensor_parallel_degree_are_restored_under_another(
    allocator, make_mesh, saved_on, restored_on, dtype, hint
):
    """bf16 pages look the same whatever the degree; fp8 pages of 4 heads do on one and two devices."""
    saved = create(allocator, make_mesh(1, saved_on), 4, 128, dtype)
    restored = create(allocator, make_mesh(1, restored_on), 4, 128, dtype)
    config = attention_config(saved, 4, 128)
    hints = dict.fromkeys(saved, hint)
    out, back = [5, 2, 7], [0, 6, 3]
    with HostPool(1 << 22) as pool:
        transfers = []
        for kv_caches in (saved, restored):
            canonical = canonicalize(kv_caches, config, hints, portable_pages=True)
            assert canonical.per_shard_layers == {}
            transfers.append(BlockTransfer(canonical, pool))
        saved, restored = fill(saved), fill(restored, seed=2)
        before, expected = numpy_copy(saved), numpy_copy(restored)
        with transfers[0].reserve(0, 3) as slots:
            transfers[0].offload(saved, 0, out, slots).wait()
            restored, ticket = transfers[1].restore(restored, 0, back, slots)
            assert ticket.wait().error is None
    for name, leaf in expected.items():
        leaf[back] = before[name][out]
        assert_same_bytes(restored[name], leaf, name)


@pytest.mark.parametrize("num_data_shards", [1, 2])
def test_latent_pages_move(allocator, make_mesh, num_data_shards):
    """Replicated over the model axis, with the packing of 32 that is the default."""
    mesh = make_mesh(num_data_shards, 4 if num_data_shards > 1 else 1)
    (leaf,) = allocator.create_kv_caches(
        num_blocks=NUM_BLOCKS,
        block_size=PAGE,
        num_kv_heads=1,
        head_size=640,
        mesh=mesh,
        layer_names=["mla"],
        use_mla=True,
    )
    spec = MLAAttentionSpec(PAGE, 576, leaf.dtype, page_size_bytes=leaf.nbytes // NUM_BLOCKS)
    config = KVCacheConfig((KVCacheGroupSpec(("mla",), spec, NUM_BLOCKS // num_data_shards),))
    check_moves({"mla": leaf}, config, {"mla": HINT}, {"mla": paged()}, num_data_shards=num_data_shards)


def test_mamba_states_move_on_a_mesh(allocator, tpu_inference, make_mesh):
    axes = tpu_inference("layers.common.sharding").ShardingAxisName
    mesh, spec = make_mesh(2, 4), jax.sharding.PartitionSpec
    states = [
        allocator.create_mamba_cache(shape, dtype, jax.sharding.NamedSharding(mesh, place))
        for shape, dtype, place in (
            ((10, 3, 64), jnp.bfloat16, spec(axes.ATTN_DATA, None, axes.ATTN_HEAD)),
            ((10, 8, 16, 16), jnp.float32, spec(axes.ATTN_DATA, axes.ATTN_HEAD, None, None)),
        )
    ]
    mamba = MambaSpec(PAGE, tuple(leaf.shape[1:] for leaf in states), tuple(leaf.dtype for leaf in states))
    config = KVCacheConfig((KVCacheGroupSpec(("mamba",), mamba, 5),))
    check_moves({"mamba": states}, config, {"mamba": HINT}, {"mamba": paged()}, num_data_shards=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.float4_e2m1fn])
def test_pages_of_the_ragged_kernel_move_in_every_dtype(tpu_inference, dtype):
    kernel = tpu_inference("kernels.ragged_paged_attention.v3.kernel")
    kv_caches = {"layer.0": jnp.zeros(kernel.get_kv_cache_shape(NUM_BLOCKS, PAGE, 3, 80, dtype), dtype)}
    config = attention_config(kv_caches, 3, 80)
    check_moves(kv_caches, config, {"layer.0": HINT}, {"layer.0": paged()})


def test_pages_of_the_batched_and_stacked_kernels_move(tpu_inference):
    """Tokens along the lanes, packed and not; both ask the TPU for its number of lanes."""
    lanes = SimpleNamespace(num_lanes=128, num_sublanes=8)
    with mock.patch("jax.experimental.pallas.tpu.get_tpu_info", return_value=lanes):
        batched = tpu_inference("kernels.experimental.batched_rpa.wrapper")
        stacked = tpu_inference("kernels.experimental.stacked_rpa.wrapper")
        layouts = batched.configs.KVLayout
        shapes = [
            batched.get_kv_cache_shape(NUM_BLOCKS, 128, 3, 80, jnp.bfloat16, layouts.SEQ_ALONG_LANE),
            batched.get_kv_cache_shape(NUM_BLOCKS, 128, 3, 80, jnp.bfloat16, layouts.HEAD_ALONG_SUBLANE),
            stacked.get_kv_cache_shape(NUM_BLOCKS, 128, 3, 80, jnp.bfloat16),
        ]
    assert shapes[0][-1] == shapes[2][-1] == 128
    for shape in shapes:
        kv_caches = {"layer.0": jnp.zeros(shape, jnp.bfloat16)}
        config = attention_config(kv_caches, 3, 80)
        check_moves(kv_caches, config, {"layer.0": HINT}, {"layer.0": paged()})
