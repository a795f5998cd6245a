"""What the serving loop asks of a model: its cache specs, its caches and one step over paged caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import jax
from jax.typing import DTypeLike

from jaxkv.spec import KVCacheConfig, LayerSpec

KVCaches = dict[str, Any]
"""``{layer_name: leaf or tuple of leaves}``; a leaf is a ``jax.Array``."""


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of one step: B rows of up to T new tokens. All arrays are int32.

    ``token_ids`` (B, T) padded at the end; ``num_computed`` (B,) tokens before the first new one;
    ``num_new`` (B,) how many of the T are real, 0 for a padding row. ``block_tables``: per group an array;
    attention groups (B, M): block of tokens ``[j * block_size, (j + 1) * block_size)``, -1 where the request
    holds none; recurrent groups (B, 2): the block the state is read from (-1: start from zeros) and the block
    the state after the last real token is written to (-1: none). Writes at -1 and of padding are dropped.
    """

    token_ids: jax.Array
    num_computed: jax.Array
    num_new: jax.Array
    block_tables: tuple[jax.Array, ...]


class Model(Protocol):
    """A decoder over paged caches. ``params`` is any pytree of arrays, passed to every step."""

    @property
    def name(self) -> str:
        """The model; part of the cache fingerprint, beside ``EngineConfig.weights_revision``."""

    @property
    def vocab_size(self) -> int:
        """Number of logits."""

    @property
    def max_model_len(self) -> int:
        """Tokens a sequence may have."""

    @property
    def params(self) -> Any:
        """The weights, a pytree of arrays."""

    def cache_groups(self, block_size: int, dtype: DTypeLike) -> Sequence[tuple[tuple[str, ...], LayerSpec]]:
        """Layer names and spec of each group, for blocks of ``block_size`` tokens stored as ``dtype``."""

    def init_caches(self, config: KVCacheConfig) -> KVCaches:
        """Zeroed caches for the groups of ``cache_groups`` with the block counts of ``config``.

        The first axis of every leaf counts blocks.
        """

    def step(self, params: Any, kv_caches: Mapping[str, Any], batch: StepBatch) -> tuple[jax.Array, KVCaches]:
        """Logits (B, vocab_size) float32 of each row's last real token, and the caches with the new tokens.

        Pure and traceable; the loop jits it and donates ``kv_caches``.
        """
