"""The toy model with its caches spread over a mesh: every head holds a share of each value.

What a cache holds is the sum over its heads, so that one wrong byte of one device changes the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy_model import ToyModel

from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, MambaSpec, SlidingWindowSpec

HEADS = 4


def head_shares() -> np.ndarray:
    """Odd factors, one for each head, that add up to 1 in 32 bits."""
    shares = [2 * head + 3 for head in range(HEADS - 1)]
    return np.array([*shares, (1 - sum(shares)) % 2**32], np.uint32)


@dataclass(frozen=True)
class MeshToyModel(ToyModel):
    """Heads are the last axis of every leaf, split over the first ``num_devices`` devices."""

    num_devices: int = HEADS

    @property
    def sharding(self):
        """Of every leaf of rank ``rank``."""
        mesh = Mesh(np.array(jax.devices("cpu")[: self.num_devices]), ("tensor",))
        return lambda rank: NamedSharding(mesh, PartitionSpec(*[None] * (rank - 1), "tensor"))

    def cache_groups(self, block_size, dtype=jnp.uint32):
        specs = {
            "full": FullAttentionSpec(block_size, HEADS, 1, dtype),
            "window": SlidingWindowSpec(block_size, HEADS, 1, dtype, self.window),
            "state": MambaSpec(block_size, ((2, HEADS),), (dtype,)),
        }
        return [((f"{kind}.0",), specs[kind]) for kind in self.kinds]

    def hints(self):
        return {"state.0": LayoutHint(0, head_axis=2)} if "state" in self.kinds else {}

    def init_caches(self, config):
        def spread(leaf):
            empty = jnp.zeros((*leaf.shape, HEADS), leaf.dtype)
            return jax.device_put(empty, self.sharding(empty.ndim))

        return jax.tree.map(spread, super().init_caches(config))

    def step(self, params, kv_caches, batch):
        def share(leaf):
            shared = leaf[..., None] * head_shares()
            return jax.lax.with_sharding_constraint(shared, self.sharding(shared.ndim))

        summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=-1, dtype=leaf.dtype), kv_caches)
        logits, caches = super().step(params, summed, batch)
        return logits, jax.tree.map(share, caches)
