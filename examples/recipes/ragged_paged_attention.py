"""Pages of ragged paged attention: JAX's own TPU kernel, tpu-inference and EasyDeL.

    python examples/recipes/ragged_paged_attention.py

A request leaves the device, another takes its pages, and it comes back to other pages with the same logits.
Then the packed layouts of tpu-inference make the same trip.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention
from jax.typing import DTypeLike

from jaxkv import (
    BlockTransfer,
    FullAttentionSpec,
    HostPool,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayoutHint,
    MLAAttentionSpec,
    canonicalize,
)
from jaxkv.keys import GroupId
from jaxkv.spec import AttentionSpec, dtype_bits

P, S, H, D = 9, 16, 4, 64  # pages, tokens a page, kv heads, head size
GROUP = GroupId(0)


def align(size: int, multiple: int) -> int:
    """``size`` rounded up."""
    return -(-size // multiple) * multiple


# --8<-- [start:shapes]
def packed_layouts(dtype: DTypeLike) -> dict[str, tuple[tuple[int, ...], AttentionSpec]]:
    """Shapes of tpu-inference 0.32 for 3 heads of 80, 4 heads of 64, and 512 + 64 latent values a token."""
    pk = 32 // dtype_bits(dtype)  # values in a 32-bit word

    def stored(shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:]) * dtype_bits(dtype) // 8  # bytes a page, padding included

    v3 = (P, S, align(2 * 3, pk) // pk, pk, align(80, 128))
    v3_head64 = (P, S, align(4, pk) // pk, pk, 128)  # K and V side by side in the lanes
    on_lanes = (P, 2 * 4, align(64, 8 * pk) // pk, pk, 128)  # the 128 tokens of a page along the lanes
    mla = (P, align(S, pk) // pk, pk, align(512, 128) + align(64, 128))
    mla_default = (P, align(S, 32) // 32, 32, mla[-1])  # MLA_KV_PACKING_SIZE=32, its default
    return {
        "v3": (v3, FullAttentionSpec(S, 3, 80, dtype, stored(v3))),
        "v3, heads of 64": (v3_head64, FullAttentionSpec(S, 4, 64, dtype, stored(v3_head64))),
        "tokens on lanes": (on_lanes, FullAttentionSpec(128, 4, 64, dtype, stored(on_lanes))),
        "MLA": (mla, MLAAttentionSpec(S, 576, dtype, stored(mla))),
        "MLA, packing 32": (mla_default, MLAAttentionSpec(S, 576, dtype, stored(mla_default))),
    }


# --8<-- [end:shapes]
def trip(kv_pages: jax.Array, spec: AttentionSpec, pages: list[int], back_to: list[int]) -> jax.Array:
    """Offload ``pages``, let another request have them, and restore them as ``back_to``."""
    # --8<-- [start:trip]
    kv_caches: Any = {"layer.0": kv_pages}
    config = KVCacheConfig((KVCacheGroupSpec(("layer.0",), spec, num_blocks=P),))
    canonical = canonicalize(kv_caches, config, hints={"layer.0": LayoutHint(block_axis=0)})
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool)
        with transfer.reserve(GROUP, len(pages)) as slots:
            transfer.offload(kv_caches, GROUP, pages, slots).wait()
            kv_caches = {"layer.0": kv_caches["layer.0"].at[jnp.array(pages)].set(1)}  # another request
            kv_caches, ticket = transfer.restore(kv_caches, GROUP, back_to, slots)
            assert ticket.wait().error is None
    # --8<-- [end:trip]
    new_pages: jax.Array = kv_caches["layer.0"]
    return new_pages


def attend(kv_pages: jax.Array, pages: list[int]) -> jax.Array:
    """What a new token of the request in these pages sees: ``float32[1, 2 * H, D]``."""
    query = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2 * H, D)), jnp.float32)
    lengths, table = jnp.array([len(pages) * S], jnp.int32), jnp.array([pages], jnp.int32)
    bounds, num_seqs = jnp.array([0, 1], jnp.int32), jnp.array([1], jnp.int32)
    logits: jax.Array = ref_ragged_paged_attention(query, kv_pages, lengths, table, bounds, num_seqs)
    return logits


def main() -> None:
    """JAX's kernel (v2) with ``[P, S, 2H, D]``, K in even and V in odd heads, then the packed ones."""
    rng = np.random.default_rng(0)
    kv_pages = jnp.array(rng.normal(size=(P, S, 2 * H, D)), jnp.float32)
    expected = attend(kv_pages, [5, 2, 7])
    kv_pages = trip(kv_pages, FullAttentionSpec(S, H, D, jnp.float32), [5, 2, 7], [1, 8, 3])
    assert np.array_equal(attend(kv_pages, [1, 8, 3]), expected), "the logits changed"
    print(f"v2 float32{[P, S, 2 * H, D]}: back in other pages, same logits")

    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        for name, (shape, spec) in packed_layouts(dtype).items():
            kv_pages = jnp.array(rng.normal(size=shape), dtype)
            page = np.array(kv_pages[4]).tobytes()
            kv_pages = trip(kv_pages, spec, [4], [6])
            assert np.array(kv_pages[6]).tobytes() == page, f"{name}: bytes changed"
            print(f"{name} {np.dtype(dtype).name}{list(shape)}: {len(page)} bytes a page, same bytes")


if __name__ == "__main__":
    main()
