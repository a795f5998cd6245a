"""A small hybrid cache, a decode step that writes it, and every op as such a step calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from gpu_program import stored_bytes

from jaxkv.canonical import canonicalize_shapes
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.records import GroupPages
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec
from jaxkv.transfer import ops, xla_ops

NUM_BLOCKS = (104, 88, 96)
TOKENS, HEADS, HEAD_SIZE = 8, 2, 32
CONV, STATE = (3, 64), (4, 16, 10)
NUM_ENTRIES, NUM_STEPS = 2, 2
GROUPS = (GroupId(0), GroupId(1), GroupId(2))

Caches = dict[str, Any]
Numbers = dict[str, Any]
"""What the ops are given beside leaves; see ``numbers``."""


_struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor


def _kv(*shape: int) -> jax.ShapeDtypeStruct:
    return _struct((*shape, TOKENS, HEADS, HEAD_SIZE), jnp.bfloat16)


def _states() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return _struct((NUM_BLOCKS[2], *CONV), jnp.bfloat16), _struct((NUM_BLOCKS[2], *STATE), jnp.float32)


CACHES: Caches = {
    "full.0": (_kv(NUM_BLOCKS[0]), _kv(NUM_BLOCKS[0])),
    "full.1": _kv(2, NUM_BLOCKS[0]),
    "window.0": {"k": _kv(NUM_BLOCKS[1]), "v": _kv(NUM_BLOCKS[1])},
    "state.0": _states(),
    "state.1": _states(),
}
_LAYERS = (("full.0", "full.1"), ("window.0",), ("state.0", "state.1"))
_SPECS = (
    FullAttentionSpec(TOKENS, HEADS, HEAD_SIZE, jnp.bfloat16),
    SlidingWindowSpec(TOKENS, HEADS, HEAD_SIZE, jnp.bfloat16, 20),
    MambaSpec(TOKENS, (CONV, STATE), (jnp.bfloat16, jnp.float32)),
)
CANONICAL = canonicalize_shapes(
    CACHES, KVCacheConfig(tuple(map(KVCacheGroupSpec, _LAYERS, _SPECS, NUM_BLOCKS)))
)
LEAF_BYTES = [stored_bytes(leaf) for leaf in jax.tree.leaves(CACHES)]


def numbers(*leading: int) -> Numbers:
    """Ids, addresses, the array of both that block ops take, and records for every group."""
    return {
        "ids": _struct((*leading, NUM_ENTRIES), jnp.int32),
        "addresses": _struct((*leading, NUM_ENTRIES), jnp.int32),
        "packed": _struct((*leading, 2 + 2 * NUM_ENTRIES), jnp.int32),
        "staging": [
            _struct((*leading, NUM_ENTRIES, pages.record_bytes), jnp.uint8) for pages in CANONICAL.groups
        ],
    }


Op = Callable[
    [HostPool, jax.Array, Numbers, GroupId, list[jax.Array]], tuple[jax.Array, jax.Array, list[jax.Array]]
]
"""Takes pool, token, numbers, group and leaves; returns the token, what else it has, and the leaves."""


def pages_of(group: GroupId) -> GroupPages:
    return CANONICAL.groups[group]


def gather_pages(pool, token, given, group, leaves):
    return token, ops.gather_pages(leaves, given["ids"], pages_of(group)), leaves


def scatter_pages(pool, token, given, group, leaves):
    staging, ids = given["staging"][group], given["ids"]
    written, status = ops.scatter_pages(staging, ids, leaves, pages_of(group))
    return token, status, written


def offload(pool, token, given, group, leaves):
    return ops.offload(pool, token, leaves, given["ids"], given["addresses"], pages_of(group))


def restore(pool, token, given, group, leaves):
    return ops.restore(pool, token, leaves, given["ids"], given["addresses"], pages_of(group))


def read_blocks(pool, token, given, group, leaves):
    return token, ops.read_blocks(pool, given["packed"], leaves, pages_of(group)), leaves


def write_blocks(pool, token, given, group, leaves):
    status, written = ops.write_blocks(pool, given["packed"], leaves, pages_of(group))
    return token, status, written


def xla_gather_pages(pool, token, given, group, leaves):
    return token, xla_ops.gather_pages(leaves, given["ids"], pages_of(group)), leaves


def xla_scatter_pages(pool, token, given, group, leaves):
    staging, ids = given["staging"][group], given["ids"]
    written, status = xla_ops.scatter_pages(staging, ids, leaves, pages_of(group))
    return token, status, written


def move_all(op: Op, pool: HostPool, token: jax.Array, given: Numbers, caches: Caches) -> tuple[Any, ...]:
    """``op`` on every group in turn."""
    results = []
    for group in GROUPS:
        leaves = CANONICAL.group_leaves(caches, group)
        token, result, leaves = op(pool, token, given, group, leaves)
        caches = CANONICAL.replace(caches, group, leaves)
        results.append(result)
    return token, results, caches


def decode(caches: Caches, position: jax.Array) -> tuple[jax.Array, Caches]:
    """Writes one token to every cache: to blocks of tokens by scatter and by slice, and whole states."""
    block, offset = position // TOKENS, position % TOKENS
    keys, values = caches["full.0"]
    hidden = (keys[block] * values[block]).sum(axis=0)
    window = caches["window.0"]
    states = caches["state.0"], caches["state.1"]
    both = jnp.broadcast_to(hidden, (2, 1, 1, HEADS, HEAD_SIZE))
    written = {
        "full.0": (keys.at[block, offset].set(hidden), values.at[block, offset].set(-hidden)),
        "full.1": jax.lax.dynamic_update_slice(caches["full.1"], both, (0, block, offset, 0, 0)),
        "window.0": {name: leaf.at[block % 40, offset].set(hidden) for name, leaf in window.items()},
        "state.0": tuple(leaf.at[block].set(leaf[block] * 0.5 + hidden[0, 0]) for leaf in states[0]),
        "state.1": tuple(leaf.at[block].set(leaf[block + 1] * 0.5 + hidden[1, 1]) for leaf in states[1]),
    }
    return hidden, written
