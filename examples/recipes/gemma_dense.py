"""Dense caches of gemma and tunix: a row for each request, no pages.

    python examples/recipes/gemma_dense.py

The dicts are those that ``init_cache`` of both packages returns. A request leaves its row, another takes it,
and it comes back to a different row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.adapters import describe_dense, set_row
from jaxkv.keys import GroupId

B, H, D, WINDOW = 3, 1, 16, 16  # rows, kv heads, head size, window of local layers
NUM_TOKENS = 40  # what the request has when it leaves, in whole blocks


def random_layer(slots: int, *, with_positions: bool) -> dict[str, jax.Array]:
    """One layer as ``init_cache`` makes it, filled with random values."""
    rng = np.random.default_rng(slots)
    layer = {
        "k": jnp.array(rng.normal(size=(B, slots, H, D)), jnp.bfloat16),
        "v": jnp.array(rng.normal(size=(B, slots, H, D)), jnp.bfloat16),
        "end_index": jnp.full(B, NUM_TOKENS, jnp.int32),
    }
    if with_positions:
        layer["positions"] = jnp.array(rng.integers(0, 99, (B, slots)), jnp.int32)
    return layer


def trip(cache: Any, windows: dict[str, int], row: int, back_to: int) -> Any:
    """The request in ``row`` leaves, another takes the row, and the request goes on in row ``back_to``."""
    # --8<-- [start:trip]
    dense = describe_dense(cache, block_size=8, windows=windows)
    kv_caches, rest = dense.split(cache)  # rest: end_index, which is not the request's content
    canonical = canonicalize(kv_caches, dense.config, dense.hints)
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool)
        groups = [GroupId(group) for group in range(len(dense.config.groups))]
        slots = {}
        for group in groups:
            ids = dense.held_blocks(group, row, tokens=range(NUM_TOKENS), num_written=NUM_TOKENS)
            slots[group] = transfer.reserve(group, len(ids)).keep()
            transfer.offload(kv_caches, group, ids, slots[group]).wait()

        kv_caches = jax.tree.map(lambda leaf: leaf.at[row].set(7), kv_caches)  # another request

        if "positions" in kv_caches["layer_0"]:
            kv_caches = set_row(kv_caches, back_to, positions=0)  # what the row's last request left there
        for group in groups:
            ids = dense.needed_blocks(group, back_to, NUM_TOKENS)
            kv_caches, ticket = transfer.restore(kv_caches, group, ids, slots[group])
            assert ticket.wait().error is None
            transfer.release(slots[group])
    return dense.join(kv_caches, set_row(rest, back_to, end_index=NUM_TOKENS))
    # --8<-- [end:trip]


def tokens_of(leaf: jax.Array, row: int, window: int | None) -> npt.NDArray[Any]:
    """What the next token of a row reads of a leaf, token after token."""
    first = 0 if window is None else NUM_TOKENS - (window - 1)
    slots = [token % leaf.shape[1] for token in range(first, NUM_TOKENS)]
    return np.array(jnp.copy(leaf))[row, slots]


def main() -> None:
    """gemma: local layers as long as global ones. tunix: local layers roll over a window's length."""
    gemma = {f"layer_{index}": random_layer(64, with_positions=True) for index in range(3)}
    tunix = {
        f"layer_{index}": random_layer(64 if index == 2 else WINDOW, with_positions=False)
        for index in range(3)
    }
    windows = {"layer_0": WINDOW, "layer_1": WINDOW}
    for name, cache in (("gemma", gemma), ("tunix", tunix)):
        expected = {
            (layer, part): tokens_of(leaf, 1, windows.get(layer))
            for layer, leaves in cache.items()
            for part, leaf in leaves.items()
            if part != "end_index"
        }
        back = trip(cache, windows, row=1, back_to=2)
        for (layer, part), tokens in expected.items():
            found = tokens_of(back[layer][part], 2, windows.get(layer))
            assert found.tobytes() == tokens.tobytes(), f"{layer}[{part}] changed"
            print(f"{name} {layer}[{part}]: {len(tokens)} tokens are back in another row")
        assert back["layer_0"]["end_index"].tolist() == [NUM_TOKENS] * B


if __name__ == "__main__":
    main()
