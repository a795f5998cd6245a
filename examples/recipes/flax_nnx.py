"""A flax NNX module that holds its paged cache in variables.

    pip install flax
    python examples/recipes/flax_nnx.py

The caches stay in the module; jaxkv is given the arrays of the moment. A request leaves the device and
comes back to other pages; its next token has the same logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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

P, S, H, D = 8, 4, 2, 8  # pages, tokens a page, heads, head size
GROUP = GroupId(0)


class Attention(nnx.Module):  # type: ignore[misc] # flax has no types here
    """Attention over pages; one request and one new token at a time."""

    def __init__(self, rngs: Any) -> None:
        self.qkv = nnx.Linear(H * D, 3 * H * D, rngs=rngs)
        self.k_pages = nnx.Cache(jnp.zeros((P, S, H, D), jnp.float32))
        self.v_pages = nnx.Cache(jnp.zeros((P, S, H, D), jnp.float32))

    def __call__(self, x: jax.Array, pages: jax.Array, index: jax.Array) -> jax.Array:
        """Store token ``index`` of the request in ``pages`` and attend: ``float32[H * D]``."""
        query, key, value = self.qkv(x).reshape(3, H, D)
        page, slot = pages[index // S], index % S
        self.k_pages[...] = self.k_pages[...].at[page, slot].set(key)
        self.v_pages[...] = self.v_pages[...].at[page, slot].set(value)
        keys, values = (cache[...][pages].reshape(-1, H, D) for cache in (self.k_pages, self.v_pages))
        scores = jnp.where(jnp.arange(len(keys)) <= index, jnp.einsum("hd,shd->hs", query, keys), -1e30)
        return jnp.einsum("hs,shd->hd", jax.nn.softmax(scores), values).reshape(-1)


class Model(nnx.Module):  # type: ignore[misc] # flax has no types here
    """Two layers."""

    def __init__(self, rngs: Any) -> None:
        self.layers = nnx.List([Attention(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, pages: jax.Array, index: jax.Array) -> jax.Array:
        """One token through all layers."""
        for layer in self.layers:
            x = x + layer(x, pages, index)
        return x


# --8<-- [start:caches]
def read_caches(model: Model) -> dict[str, Any]:
    """The arrays the variables hold now. Ask again each step: a step leaves new ones in them."""
    return {
        f"layers.{index}": (layer.k_pages.get_value(), layer.v_pages.get_value())
        for index, layer in enumerate(model.layers)
    }


def write_caches(model: Model, kv_caches: Any) -> None:
    """Put back what a restore returned; the arrays it was given are consumed."""
    for index, layer in enumerate(model.layers):
        keys, values = kv_caches[f"layers.{index}"]
        layer.k_pages.set_value(keys)
        layer.v_pages.set_value(values)


# --8<-- [end:caches]
def main() -> None:
    """Eight tokens are computed, leave, and a ninth sees them in other pages."""
    model = Model(nnx.Rngs(0))
    step = nnx.jit(lambda model, x, pages, index: model(x, pages, index))
    tokens = jnp.array(np.random.default_rng(0).normal(size=(9, H * D)), jnp.float32)
    for index in range(8):
        step(model, tokens[index], jnp.array([5, 2, 7]), index)
    expected = step(model, tokens[8], jnp.array([5, 2, 7]), 8)
    # --8<-- [start:trip]
    kv_caches: Any = read_caches(model)
    spec = FullAttentionSpec(S, H, D, jnp.float32)
    config = KVCacheConfig((KVCacheGroupSpec(tuple(kv_caches), spec, num_blocks=P),))
    hints = dict.fromkeys(kv_caches, LayoutHint(block_axis=0))
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, config, hints), pool)
        with transfer.reserve(GROUP, 2) as slots:
            transfer.offload(kv_caches, GROUP, [5, 2], slots).wait()
            kv_caches = jax.tree.map(jnp.zeros_like, kv_caches)  # other requests
            kv_caches, ticket = transfer.restore(kv_caches, GROUP, [1, 6], slots)
            assert ticket.wait().error is None
    write_caches(model, kv_caches)
    # --8<-- [end:trip]
    logits = step(model, tokens[8], jnp.array([1, 6, 3]), 8)
    assert np.array_equal(logits, expected), "the logits changed"
    print(f"{len(kv_caches)} layers in nnx.Cache variables: 8 tokens are back in other pages, same logits")


if __name__ == "__main__":
    main()
