"""JAX's own paged attention on GPU: K and V with heads outside pages, int8 values and their scales.

    python examples/recipes/gpu_paged_attention.py

The kernel itself runs here, interpreted on the CPU. A request leaves the device and comes back to other
pages; it is answered as before.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import (
    BlockTransfer,
    FullAttentionSpec,
    HostPool,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayoutHint,
    canonicalize,
)
from jaxkv.keys import GroupId

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jax 0.12 announces the end of this module
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

H, P, S, D = 2, 8, 4, 8  # kv heads, pages, tokens a page, head size
GROUP = GroupId(0)


def make_caches(dtype: Any) -> dict[str, dict[str, jax.Array]]:
    """Random pages of one layer: ``[H, P, S, D]``, and ``[H, P, S]`` scales beside int8."""
    rng = np.random.default_rng(0)
    layer = {name: jnp.array(rng.integers(-100, 100, (H, P, S, D)), dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        scales = {f"{name}_scales": jnp.array(rng.random((H, P, S)), jnp.float32) for name in ("k", "v")}
        layer |= scales
    return {"layer.0": layer}


def attend(layer: dict[str, jax.Array], pages: list[int]) -> jax.Array:
    """The answer to a request of two pages."""
    query = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2 * H, D)), jnp.float32)
    table, lengths = jnp.array([pages], jnp.int32), jnp.array([len(pages) * S - 1], jnp.int32)
    answer: jax.Array = paged_attention(
        query,
        layer["k"],
        layer["v"],
        table,
        lengths,
        layer.get("k_scales"),
        layer.get("v_scales"),
        pages_per_compute_block=1,
        k_splits=1,
        interpret=True,
    )
    return answer


def main() -> None:
    """Plain values first, then int8 with scales."""
    for dtype, scale_bytes in ((jnp.float32, 0), (jnp.int8, 4)):
        kv_caches: Any = make_caches(dtype)
        expected = attend(kv_caches["layer.0"], [5, 2])
        # --8<-- [start:trip]
        values = 2 * S * H * D * np.dtype(dtype).itemsize
        scales = 2 * S * H * scale_bytes
        spec = FullAttentionSpec(S, H, D, dtype, page_size_bytes=values + scales)
        config = KVCacheConfig((KVCacheGroupSpec(("layer.0",), spec, num_blocks=P),))
        hints = {"layer.0": LayoutHint(block_axis=1, head_axis=0)}  # the same for all leaves of the layer
        with HostPool(1 << 20) as pool:
            transfer = BlockTransfer(canonicalize(kv_caches, config, hints), pool)
            with transfer.reserve(GROUP, 2) as slots:
                transfer.offload(kv_caches, GROUP, [5, 2], slots).wait()
                kv_caches = jax.tree.map(jnp.zeros_like, kv_caches)  # others use the pages
                kv_caches, ticket = transfer.restore(kv_caches, GROUP, [1, 6], slots)
                assert ticket.wait().error is None
        # --8<-- [end:trip]
        assert np.array_equal(attend(kv_caches["layer.0"], [1, 6]), expected), "the answer changed"
        leaves = ", ".join(
            f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in kv_caches["layer.0"].items()
        )
        print(f"{leaves}: {values + scales} bytes a page, same answer")


if __name__ == "__main__":
    main()
