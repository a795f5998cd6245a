"""Dense caches of MaxText: a prefill and an autoregressive cache a layer, any axis order, quantized.

    python examples/recipes/maxtext_dense.py

The arrays are those of ``maxtext.inference.kvcache.KVCache`` with int8 values. A request leaves its row,
another takes it, and it comes back to a different row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import describe_dense, set_row
from jaxkv.keys import GroupId

B, H, D = 3, 2, 8  # rows, kv heads, head size
PREFILL, AR = 32, 16  # max_prefill_length, max_target_length - max_prefill_length
AXIS_ORDER = (1, 2, 0, 3)  # MaxText's default cache_axis_order: stored as [tokens, heads, rows, head size]
PROMPT, GENERATED = 24, 8  # tokens the request has in each cache, in whole blocks


def random_cache(stage: str, slots: int) -> dict[str, jax.Array]:
    """One cache of one layer; without MaxText at hand, as its ``KVCache`` has it for ``stage``."""
    rng = np.random.default_rng(slots)
    cache = {}
    for part in ("key", "value"):
        values = rng.integers(-128, 128, (slots, H, B, D))
        cache[f"cached_{stage}_{part}"] = jnp.array(values, jnp.int8)
        cache[f"cached_{stage}_{part}_scale"] = jnp.array(rng.random((slots, 1, B, 1)), jnp.bfloat16)
    cache[f"cache_{stage}_segment_id"] = jnp.ones((B, slots), jnp.int32)
    return cache


def trip(cache: Any, row: int, back_to: int) -> Any:
    """The request in ``row`` leaves, another takes the row, and the request goes on in row ``back_to``."""
    # --8<-- [start:trip]
    dense = describe_dense(
        cache,
        block_size=8,
        token_leaves=[
            f"cached_{stage}_{part}{scale}"
            for stage in ("prefill", "ar")
            for part in ("key", "value")
            for scale in ("", "_scale")
        ],
        axis_order=AXIS_ORDER,
    )
    kv_caches, rest = dense.split(cache)  # rest: segment ids, which say what slots of a row are valid
    canonical = canonicalize(kv_caches, dense.config, dense.hints)
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool)
        for index, group in enumerate(dense.config.groups):
            (layer,) = group.layer_names
            num_tokens = PROMPT if layer.endswith("prefill") else GENERATED
            out = dense.held_blocks(GroupId(index), row, range(num_tokens), num_written=num_tokens)
            with transfer.reserve(GroupId(index), len(out)) as slots:
                transfer.offload(kv_caches, GroupId(index), out, slots).wait()
                kv_caches = {**kv_caches, layer: jax.tree.map(jnp.zeros_like, kv_caches[layer])}  # others
                back = dense.needed_blocks(GroupId(index), back_to, num_tokens)
                kv_caches, ticket = transfer.restore(kv_caches, GroupId(index), back, slots)
                assert ticket.wait().error is None
    valid = {"prefill": np.arange(PREFILL) < PROMPT, "ar": np.arange(AR) < GENERATED}
    rest = set_row(rest, back_to, **{f"cache_{stage}_segment_id": valid[stage] for stage in valid})
    return dense.join(kv_caches, rest)
    # --8<-- [end:trip]


def main() -> None:
    """One layer; more layers are more entries of the dict."""
    cache = {"layer.0/prefill": random_cache("prefill", PREFILL), "layer.0/ar": random_cache("ar", AR)}
    before = {
        (layer, name): np.array(jnp.copy(leaf))
        for layer, leaves in cache.items()
        for name, leaf in leaves.items()
    }
    cache = trip(cache, row=1, back_to=2)
    for (layer, name), was in before.items():
        num_tokens = PROMPT if layer.endswith("prefill") else GENERATED
        found = np.array(jnp.copy(cache[layer][name]))
        if name.endswith("segment_id"):
            assert found[2].sum() == num_tokens
            continue
        assert found[:num_tokens, :, 2].tobytes() == was[:num_tokens, :, 1].tobytes(), f"{name} changed"
        print(f"{name} {was.dtype}{list(was.shape)}: {num_tokens} tokens are back in another row")


if __name__ == "__main__":
    main()
