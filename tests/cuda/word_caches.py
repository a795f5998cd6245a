"""Caches of 32-bit words that a decode loop rewrites as a whole, and what NumPy knows of them at any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.slots import Slots
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer, Ticket

GROUP = GroupId(0)
TOKENS = 4
FACTOR, SUMMAND = 1664525, 1013904223

Caches = dict[str, jax.Array]


def make_caches(num_leaves: int, num_blocks: int, page_bytes: int, seed: int = 0) -> Caches:
    """Leaves ``(blocks, 2, tokens, 1, size)`` of different random words; a block has a page in each."""
    shape = (num_blocks, 2, TOKENS, 1, page_bytes // (8 * TOKENS))
    keys = jax.random.split(jax.random.key(seed), num_leaves)
    return {f"layers.{i}": jax.random.bits(keys[i], shape, jnp.uint32) for i in range(num_leaves)}


def canonical_of(caches: Caches) -> CanonicalKVCaches:
    blocks, _, tokens, heads, size = next(iter(caches.values())).shape
    spec = FullAttentionSpec(tokens, heads, size, jnp.uint32)
    return canonicalize(caches, KVCacheConfig((KVCacheGroupSpec(tuple(caches), spec, blocks),)))


def on_host(caches: Caches) -> np.ndarray:
    """The words by block: what a record of each block is, where pages need no padding."""
    leaves = [np.array(jnp.copy(leaf)) for leaf in caches.values()]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@partial(jax.jit, donate_argnums=0)
def decode(caches: Caches) -> Caches:
    """A step that leaves no word as it was, in place."""
    return jax.tree.map(lambda leaf: leaf * jnp.uint32(FACTOR) + jnp.uint32(SUMMAND), caches)


def decoded(words: np.ndarray) -> np.ndarray:
    """What ``decode`` makes of words."""
    return words * np.uint32(FACTOR) + np.uint32(SUMMAND)


def held(pool: HostPool, slots: Sequence[Any]) -> bytes:
    return b"".join(bytes(pool.view(slot)) for slot in slots)


@dataclass
class DecodeLoop:
    """A loop that offloads blocks after every step and waits for nothing, and what should come of it.

    From ``lag`` steps on it also restores, into other blocks, what it offloaded ``lag`` steps before.
    """

    pool: HostPool
    num_blocks: int
    num_offloaded: int
    lag: int | None = None
    seed: int = 0
    expected: list[bytes] = field(default_factory=list)
    slots: list[Slots] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)

    def run(self, num_steps: int, num_leaves: int, page_bytes: int, **options: Any) -> None:
        caches = make_caches(num_leaves, self.num_blocks, page_bytes, self.seed)
        words = on_host(caches)
        self.transfer = BlockTransfer(canonical_of(caches), self.pool, **options)
        rng = np.random.default_rng(self.seed)
        for step in range(num_steps):
            caches, words = decode(caches), decoded(words)
            ids = rng.permutation(self.num_blocks)[: self.num_offloaded]
            self._offload(caches, words, ids)
            if self.lag is not None and step >= self.lag:
                into = rng.permutation(self.num_blocks)[: self.num_offloaded]
                caches = self._restore(caches, into, step - self.lag)
                old = np.frombuffer(self.expected[step - self.lag], np.uint32)
                words[into] = old.reshape(len(into), -1)
        self.caches, self.words = decode(caches), decoded(words)

    def check(self) -> None:
        """Every slot and the caches hold what NumPy finds, and no leaf was ever copied."""
        for ticket in self.tickets:
            assert ticket.wait().error is None
        for step, (slots, wanted) in enumerate(zip(self.slots, self.expected, strict=True)):
            assert_same_bytes(held(self.pool, slots), wanted, f"what step {step} offloaded")
            self.transfer.release(slots)
        assert_same_bytes(on_host(self.caches), self.words, "the caches")
        assert self.transfer.num_copied_leaves == 0

    def _offload(self, caches: Caches, words: np.ndarray, ids: np.ndarray) -> None:
        with self.transfer.reserve(GROUP, len(ids)) as lease:
            slots = lease.keep()
        self.tickets.append(self.transfer.offload(caches, GROUP, ids, slots))
        self.slots.append(slots)
        self.expected.append(words[ids].tobytes())

    def _restore(self, caches: Caches, into: np.ndarray, step: int) -> Caches:
        restored, ticket = self.transfer.restore(caches, GROUP, into, self.slots[step])
        self.tickets.append(ticket)
        return dict(restored)
