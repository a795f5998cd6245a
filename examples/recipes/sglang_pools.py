"""Pools of sglang-jax: full attention, a sliding window behind an index map, states by request.

    python examples/recipes/sglang_pools.py

Arrays and tables are those of ``SWAKVPool``, ``RecurrentStatePool`` and their allocators. A request leaves
all three pools, others take its pages and its state, and it comes back elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxkv import (
    BlockTransfer,
    FullAttentionSpec,
    HostPool,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayoutHint,
    MambaSpec,
    SlidingWindowSpec,
    canonicalize,
)
from jaxkv.adapters import map_slots, page_ids, state_ids
from jaxkv.keys import GroupId

PAGE, WINDOW, NUM_TOKENS = 8, 12, 32
FULL, SWA, STATES = 12, 6, 5  # pages and slots, the dummy 0 included

# --8<-- [start:config]
SHAPES: dict[str, Any] = {
    "layer.0": ((SWA, PAGE, 2, 2, 128), jnp.bfloat16),  # swa_kv_pool.kv_buffer[0]
    "layer.1": ((FULL, PAGE, 4, 2, 128), jnp.bfloat16),  # full_kv_pool.kv_buffer[0]
    "layer.2": [((STATES, 128, 3), jnp.bfloat16), ((STATES, 4, 16, 16), jnp.float32)],  # conv, recurrent
}
CONFIG = KVCacheConfig(
    (
        KVCacheGroupSpec(("layer.0",), SlidingWindowSpec(PAGE, 2, 128, jnp.bfloat16, WINDOW), SWA),
        KVCacheGroupSpec(("layer.1",), FullAttentionSpec(PAGE, 4, 128, jnp.bfloat16), FULL),
        KVCacheGroupSpec(
            ("layer.2",), MambaSpec(16, ((128, 3), (4, 16, 16)), (jnp.bfloat16, jnp.float32)), STATES
        ),
    )
)
HINTS = dict.fromkeys(("layer.0", "layer.1", "layer.2"), LayoutHint(block_axis=0))


def block_ids(
    token_slots: npt.NDArray[np.int32], full_to_swa: npt.NDArray[np.int32], state_slot: int
) -> list[npt.NDArray[np.int32]]:
    """What a request's row of ``req_to_token`` and its state slot mean in the three groups."""
    return [
        page_ids(map_slots(token_slots, full_to_swa), PAGE, num_reserved=1),
        page_ids(token_slots, PAGE, num_reserved=1),
        state_ids(len(token_slots) // 16, state_slot, num_reserved=1),
    ]


# --8<-- [end:config]
def slots_of(pages: list[int]) -> npt.NDArray[np.int32]:
    """The token slots of whole pages."""
    return (np.array(pages)[:, None] * PAGE + np.arange(PAGE)).reshape(-1).astype(np.int32)


def allocate(
    full_pages: list[int], swa_pages: list[int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Token slots and index map of a request whose window has passed all but its last pages."""
    token_slots, full_to_swa = slots_of(full_pages), np.zeros(FULL * PAGE, np.int32)
    swa_slots = slots_of(swa_pages)
    full_to_swa[token_slots[-len(swa_slots) :]] = swa_slots
    return token_slots, full_to_swa


def main() -> None:
    """Out, overwritten, and back."""
    rng = np.random.default_rng(0)
    kv_caches: Any = jax.tree.map(
        lambda leaf: jnp.array(rng.normal(size=leaf[0]), leaf[1]),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    before = jax.tree.map(lambda leaf: np.array(jnp.copy(leaf)), kv_caches)
    # --8<-- [start:trip]
    out = block_ids(*allocate([3, 9, 1, 4], [2, 5]), state_slot=3)
    back = block_ids(*allocate([7, 2, 8, 6], [1, 4]), state_slot=1)
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, CONFIG, HINTS), pool)
        slots = [transfer.reserve(GroupId(group), len(ids)).keep() for group, ids in enumerate(out)]
        for group, ids in enumerate(out):
            transfer.offload(kv_caches, GroupId(group), ids, slots[group]).wait()
        kv_caches = jax.tree.map(jnp.zeros_like, kv_caches)  # other requests
        for group, ids in enumerate(back):
            kv_caches, ticket = transfer.restore(kv_caches, GroupId(group), ids, slots[group])
            assert ticket.wait().error is None
            transfer.release(slots[group])
    # --8<-- [end:trip]
    for group, spec in enumerate(CONFIG.groups):
        (layer,) = spec.layer_names
        moved = out[group] >= 0
        for was, now in zip(jax.tree.leaves(before[layer]), jax.tree.leaves(kv_caches[layer]), strict=True):
            expected = was[out[group][moved]]
            assert np.array(now)[back[group][moved]].tobytes() == expected.tobytes(), f"{layer} changed"
        print(f"{layer}: {out[group].tolist()} came back as {back[group].tolist()}, same bytes")


if __name__ == "__main__":
    main()
