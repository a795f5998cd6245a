"""Pools of sglang-jax: the wheel's, and, where a newer one is installed, sliding and recurrent ones."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

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
    SlidingWindowSpec,
    canonicalize,
)
from jaxkv.adapters import map_slots, page_ids, state_ids
from jaxkv.testing import assert_same_caches, numpy_copy

require("sgl_jax")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the wheel says ``with mesh:``

SIZE, PAGE, HEADS, DIM, TOKENS = 64, 8, 4, 128, 24
NUM_PAGES = SIZE // PAGE + 1
HINT = LayoutHint(block_axis=0)


@pytest.fixture(scope="module")
def sgl_jax():
    """Imports a module of ``sgl_jax.srt.mem_cache``."""
    given = {"sgl_jax.srt.utils": module("sgl_jax.srt.utils", cdiv=lambda a, b: -(-a // b))}
    with hollow("sgl_jax", given=given):
        yield lambda name: importlib.import_module(f"sgl_jax.srt.mem_cache.{name}")


@pytest.fixture(scope="module")
def pools(sgl_jax):
    return sgl_jax("memory_pool")


@pytest.fixture(scope="module")
def newer(pools):
    if not hasattr(pools, "SWAKVPool"):
        pytest.skip(
            "this sglang-jax has no sliding and recurrent pools; put a checkout's python/ on PYTHONPATH"
        )
    return pools


def make_mesh(pools):
    kind = jax.sharding.AxisType.Explicit if hasattr(pools, "SWAKVPool") else jax.sharding.AxisType.Auto
    return jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(kind,) * 2)


def stored_bytes(leaf, num_blocks):
    return leaf.nbytes // num_blocks


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_pages_of_a_pool_move(pools, dtype):
    pool = pools.MHATokenToKVPool(
        size=SIZE,
        page_size=PAGE,
        dtype=dtype,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=2,
        mesh=make_mesh(pools),
    )
    kv_caches = {f"layer.{index}": leaf for index, leaf in enumerate(pool.kv_buffer)}
    spec = FullAttentionSpec(PAGE, HEADS, DIM, dtype)
    config = KVCacheConfig((KVCacheGroupSpec(tuple(kv_caches), spec, NUM_PAGES),))
    # The wheel's pool counts tokens, newer ones pages.
    entries = kv_caches["layer.0"].shape[0] // NUM_PAGES
    assert entries in (1, PAGE)
    hint = LayoutHint(block_axis=0, kernel_blocks_per_block=entries)
    where = dict.fromkeys(kv_caches, paged(entries=entries))
    check_moves(kv_caches, config, dict.fromkeys(kv_caches, hint), where)


def test_pages_of_latent_attention_move(pools):
    pool = pools.MLATokenToKVPool(
        size=SIZE,
        page_size=PAGE,
        dtype=jnp.bfloat16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        layer_num=2,
        mesh=make_mesh(pools),
    )
    kv_caches = {f"layer.{index}": leaf for index, leaf in enumerate(pool.kv_buffer)}
    leaf = kv_caches["layer.0"]
    spec = MLAAttentionSpec(PAGE, 576, jnp.bfloat16, stored_bytes(leaf, NUM_PAGES))
    config = KVCacheConfig((KVCacheGroupSpec(tuple(kv_caches), spec, NUM_PAGES),))
    entries = leaf.shape[0] // NUM_PAGES
    hint = LayoutHint(block_axis=0, kernel_blocks_per_block=entries)
    where = dict.fromkeys(kv_caches, paged(entries=entries))
    check_moves(kv_caches, config, dict.fromkeys(kv_caches, hint), where)


@dataclass
class Server:
    """Pools and tables of sglang-jax as its scheduler uses them."""

    kv_pool: Any
    allocator: Any
    states: Any
    requests: Any

    @classmethod
    def of(cls, pools, sgl_jax):
        mesh = make_mesh(pools)
        kv_pool = pools.SWAKVPool(
            size=SIZE,
            size_swa=40,
            page_size=PAGE,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            swa_head_num=2,
            dtype=jnp.bfloat16,
            head_num=HEADS,
            head_dim=DIM,
            mesh=mesh,
        )
        make_allocator = sgl_jax("allocator").SWATokenToKVPoolAllocator
        allocator = make_allocator(size=SIZE, size_swa=40, page_size=PAGE, kvcache=kv_pool)
        make_states = sgl_jax("recurrent_state_pool").RecurrentStatePool
        states = make_states([2], size=6, num_heads=4, head_dim=16, conv_kernel_size=4, mesh=mesh)
        return cls(kv_pool, allocator, states, pools.HybridReqToTokenPool(4, 64, np.int32, states))

    def caches(self):
        return {
            "swa": self.kv_pool.swa_kv_pool.kv_buffer[0],
            "full": self.kv_pool.full_kv_pool.kv_buffer[0],
            "state": [self.states.conv_buffers[0][0], self.states.recurrent_buffers[0]],
        }

    def config(self):
        caches = self.caches()
        states = caches["state"]
        specs = {
            "swa": SlidingWindowSpec(PAGE, 2, DIM, jnp.bfloat16, 12),
            "full": FullAttentionSpec(PAGE, HEADS, DIM, jnp.bfloat16),
            "state": MambaSpec(TOKENS, tuple(s.shape[1:] for s in states), tuple(s.dtype for s in states)),
        }
        counts = {name: jax.tree.leaves(caches[name])[0].shape[0] for name in caches}
        return KVCacheConfig(
            tuple(KVCacheGroupSpec((name,), spec, counts[name]) for name, spec in specs.items())
        )

    def arrive(self):
        """A request of three pages, of which the window has passed the first."""
        request = SimpleNamespace(req_pool_idx=None, recurrent_pool_idx=None, dp_rank=None, is_chunked=0)
        (row,) = self.requests.alloc([request])
        self.requests.write((row, slice(0, TOKENS)), self.allocator.alloc_extend([0], [TOKENS], [-1], TOKENS))
        self.allocator.free_swa(self.requests.read(row, PAGE))
        return request

    def leave(self, request):
        self.allocator.free(self.requests.read(request.req_pool_idx, TOKENS))
        self.requests.free(request)

    def block_ids(self, request):
        tokens = self.requests.read(request.req_pool_idx, TOKENS)
        slot = self.requests.req_index_to_recurrent_index_mapping[request.req_pool_idx]
        return [
            page_ids(map_slots(tokens, self.allocator.full_to_swa_index_mapping), PAGE, num_reserved=1),
            page_ids(tokens, PAGE, num_reserved=1),
            state_ids(1, slot, num_reserved=1),
        ]


def test_a_request_leaves_sliding_and_recurrent_pools_and_comes_back_elsewhere(newer, sgl_jax):
    """Their allocators hand out pages and slots; block ids come from their tables."""
    server = Server.of(newer, sgl_jax)
    config = server.config()
    canonical = canonicalize(server.caches(), config, dict.fromkeys(server.caches(), HINT))
    kv_caches = fill(server.caches())
    before = numpy_copy(kv_caches)
    leaving = server.arrive()
    out = server.block_ids(leaving)
    assert out[0][0] == -1
    assert (out[0][1:] > 0).all()
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool)
        slots = [transfer.reserve(group, len(ids)).keep() for group, ids in enumerate(out)]
        for group, ids in enumerate(out):
            transfer.offload(kv_caches, group, ids, slots[group]).wait()
        server.leave(leaving)
        back, others = server.block_ids(server.arrive()), server.block_ids(server.arrive())
        assert not set(back[1]) & set(out[1])
        assert set(others[1]) & set(out[1]), "another request has pages of the one that left"
        kv_caches = fill(kv_caches, seed=2)
        expected = numpy_copy(kv_caches)
        for group, ids in enumerate(back):
            kv_caches, _ = transfer.restore(kv_caches, group, ids, slots[group])
            transfer.release(slots[group])
    for group, old, new in zip(config.groups, out, back, strict=True):
        (name,) = group.layer_names
        held = old >= 0
        assert (held == (new >= 0)).all()
        for leaf, was in zip(jax.tree.leaves(expected[name]), jax.tree.leaves(before[name]), strict=True):
            leaf[new[held]] = was[old[held]]
    assert_same_caches(kv_caches, expected)
