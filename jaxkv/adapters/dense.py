"""Dense caches of whole requests seen as blocks: what to register, and which blocks hold which tokens.

gemma, tunix and MaxText have no pool of pages but a row for each request of a batch, ``[B, L, H, D]``, and
beside it how far each row is filled. Here ``L // block_size`` blocks stand in a row, in place: this module
describes leaves and computes ids; the only values it writes are those of ``set_row``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from jaxkv.errors import BlockIdError, CacheMismatchError, ConfigError
from jaxkv.hits import HitGroup, required_chunks
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    dtype_bits,
)

DenseCache = Mapping[str, Mapping[str, Any]]
"""``{layer_name: {leaf_name: array}}``, as gemma's and tunix's ``init_cache`` return it."""

_BATCH, _TOKEN, _HEAD, _DIM = range(4)


@final
@dataclass(frozen=True, slots=True)
class DenseCaches:
    """How a dense cache is registered, and which blocks hold the tokens of a row. Holds no array.

    ``canonicalize(split(cache)[0], config, hints)`` takes it from here. Layers of one group have the same
    spec and ``row_slots[group]`` token slots to a row. Token ``t`` of a row lies in slot ``t % row_slots``:
    a row that is shorter than its request rolls. ``num_rows``, and with it row numbers, counts the rows of
    one data shard.
    """

    config: KVCacheConfig
    hints: Mapping[str, tuple[LayoutHint, ...]] = field(hash=False)
    token_leaves: tuple[str, ...]
    num_rows: int
    row_slots: tuple[int, ...]

    def split(self, cache: DenseCache) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """``(kv_caches, bookkeeping)``: the leaves to register, and what else the cache holds."""
        kv_caches = {layer: _pick(cache[layer], self.token_leaves, wanted=True) for layer in self.hints}
        bookkeeping = {
            layer: _pick(leaves, self.token_leaves if layer in self.hints else (), wanted=False)
            for layer, leaves in cache.items()
        }
        return kv_caches, bookkeeping

    def join(self, kv_caches: DenseCache, bookkeeping: DenseCache) -> dict[str, dict[str, Any]]:
        """The cache that ``split`` took apart."""
        return {layer: {**kv_caches.get(layer, {}), **leaves} for layer, leaves in bookkeeping.items()}

    def held_blocks(self, group: GroupId, row: int, tokens: range, num_written: int) -> npt.NDArray[np.int32]:
        """Block ids of ``tokens`` of a row that was given ``num_written`` tokens: what can be offloaded.

        ``int32[len(tokens) // block_size]``, -1 for a block that later tokens have begun to overwrite. Tokens
        count from the start of the request, as the cache counts them, padding included. Raises
        ``BlockIdError`` unless ``tokens`` are whole blocks that were written.
        """
        blocks = self._whole_blocks(group, tokens)
        if tokens.stop > num_written:
            raise BlockIdError(
                f"tokens {tokens.start} to {tokens.stop} of row {row} were asked for, but only {num_written} "
                "were written; stop at the last complete block"
            )
        first_held = num_written - self.row_slots[group]
        held = blocks * self.config.groups[group].block_size >= first_held
        return np.where(held, self._in_row(group, row, blocks), -1).astype(np.int32)

    def needed_blocks(self, group: GroupId, row: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """Block ids to restore, so that a row can go on behind its first ``num_tokens`` tokens.

        ``int32[num_tokens // block_size]``, -1 for a block that no later token reads: those that a window has
        left behind. Raises ``BlockIdError`` where ``num_tokens`` is no block boundary, or a row is
        too short for what is needed.
        """
        ids = np.full(self._whole_blocks(group, range(num_tokens)).size, -1, np.int32)
        spec = self.config.groups[group].spec
        ranges = required_chunks(HitGroup(spec, spec.block_size), num_tokens)
        needed = np.concatenate([np.asarray(blocks, np.int64) for blocks in ranges])
        if needed.size * spec.block_size > self.row_slots[group]:
            raise BlockIdError(
                f"the token behind the first {num_tokens} reads tokens from {needed[0] * spec.block_size} "
                f"on, but a row of group {group} has {self.row_slots[group]} slots; make the cache longer, "
                "or restore fewer tokens"
            )
        ids[needed] = self._in_row(group, row, needed)
        return ids

    def _whole_blocks(self, group: GroupId, tokens: range) -> npt.NDArray[np.int64]:
        if not 0 <= group < len(self.config.groups):
            raise ConfigError(f"there is no group {group}; the cache has {len(self.config.groups)}")
        size = self.config.groups[group].block_size
        if tokens.step != 1 or tokens.start % size or tokens.stop % size or tokens.start < 0:
            raise BlockIdError(f"{tokens} are not whole blocks of {size} tokens; round down to a multiple")
        return np.arange(tokens.start // size, tokens.stop // size)

    def _in_row(self, group: GroupId, row: int, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if not 0 <= row < self.num_rows:
            raise BlockIdError(f"there is no row {row}; the cache has rows 0 to {self.num_rows - 1}")
        per_row = self.row_slots[group] // self.config.groups[group].block_size
        return row * per_row + blocks % per_row


def set_row(cache: DenseCache, row: int, **values: ArrayLike) -> dict[str, dict[str, Any]]:
    """``cache`` with row ``row`` of every leaf of a given name set, in all layers: ``end_index=48``.

    For bookkeeping, whose axis 0 counts rows; other leaves are handed on. Raises ``CacheMismatchError``
    where no layer has such a leaf.
    """
    known = {name for leaves in cache.values() for name in leaves}
    if not values.keys() <= known:
        raise CacheMismatchError(
            f"no layer has a leaf {sorted(values.keys() - known)}; the leaves are {sorted(known)}"
        )
    return {
        layer: {
            name: leaf.at[row].set(values[name]) if name in values else leaf for name, leaf in leaves.items()
        }
        for layer, leaves in cache.items()
    }


def describe_dense(
    cache: DenseCache,
    block_size: int,
    *,
    token_leaves: Sequence[str] = ("k", "v", "positions"),
    axis_order: Sequence[int] = (0, 1, 2, 3),
    windows: Mapping[str, int] | None = None,
) -> DenseCaches:
    """The ``DenseCaches`` of arrays, or of what has their ``shape`` and ``dtype``.

    ``token_leaves`` are the leaves that hold something for each token, as far as a layer has them; the first
    is K, or what stands for it. Leaves of rank 4 are ``[batch, token, head, dim]`` transposed to
    ``axis_order`` (MaxText: ``cache_axis_order``); those of other ranks begin with ``[batch, token]``.
    ``windows`` maps layers with sliding attention to the window. Layers with none of ``token_leaves`` are
    bookkeeping. Layers that differ in spec or row length become groups, layers in sorted order.

    Raises ``CacheMismatchError`` for leaves that do not agree, ``ConfigError`` for a row that
    ``block_size`` does not divide.
    """
    if block_size < 1 or sorted(axis_order) != [0, 1, 2, 3]:
        raise ConfigError(
            "block_size must be at least 1 and axis_order an order of 0, 1, 2, 3, "
            f"got {block_size} and {tuple(axis_order)}"
        )
    layers = dict(_dense_layers(cache, token_leaves, axis_order))
    _require_described(cache, layers, token_leaves, windows or {})
    of_group: dict[_Rows, list[str]] = {}
    for layer, leaves in layers.items():
        of_group.setdefault(_rows_of(layer, leaves, block_size, (windows or {}).get(layer)), []).append(layer)
    num_rows = {rows.num_rows for rows in of_group}
    if len(num_rows) > 1:
        raise CacheMismatchError(f"layers have {sorted(num_rows)} rows; describe those that differ apart")
    return DenseCaches(
        config=KVCacheConfig(tuple(rows.group(names) for rows, names in of_group.items())),
        hints={layer: _hints_of(leaves, block_size) for layer, leaves in layers.items()},
        token_leaves=tuple(token_leaves),
        num_rows=num_rows.pop(),
        row_slots=tuple(rows.num_slots for rows in of_group),
    )


@final
@dataclass(frozen=True, slots=True)
class _Rows:
    """What the layers of one group have in common: a spec, token slots to a row, rows of one data shard."""

    spec: FullAttentionSpec | SlidingWindowSpec
    num_slots: int
    num_rows: int

    def group(self, layer_names: Sequence[str]) -> KVCacheGroupSpec:
        """The group of these layers."""
        num_blocks = self.num_rows * self.num_slots // self.spec.block_size
        return KVCacheGroupSpec(tuple(layer_names), self.spec, num_blocks)


@final
@dataclass(frozen=True, slots=True)
class _DenseLeaf:
    """One leaf with a value for each token; ``axes`` are those of batch, token, head and dim it has."""

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    axes: tuple[int, ...]

    def __str__(self) -> str:
        held = "" if self.local_shape == self.shape else f" (each device holds {list(self.local_shape)})"
        return f"{self.name} {list(self.shape)}{held}"

    def bits_per_token(self) -> int:
        """Bits one token takes, over all devices that share it."""
        tokens = self.shape[self.axes[_BATCH]] * self.shape[self.axes[_TOKEN]]
        return int(np.prod(self.shape)) // tokens * dtype_bits(self.dtype)


def _hints_of(leaves: Sequence[_DenseLeaf], block_size: int) -> tuple[LayoutHint, ...]:
    """One for each leaf, in the order in which JAX lists the leaves of a dict."""
    return tuple(
        LayoutHint(
            block_axis=(leaf.axes[_BATCH], leaf.axes[_TOKEN]),
            kernel_blocks_per_block=block_size,
            head_axis=leaf.axes[_HEAD] if len(leaf.axes) == 4 else None,
        )
        for leaf in sorted(leaves, key=lambda leaf: leaf.name)
    )


def _pick(leaves: Mapping[str, Any], names: Sequence[str], *, wanted: bool) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if (name in names) is wanted}


def _dense_layers(
    cache: DenseCache, token_leaves: Sequence[str], axis_order: Sequence[int]
) -> Iterator[tuple[str, list[_DenseLeaf]]]:
    for layer in sorted(cache):
        leaves = [
            _describe_leaf(f"{layer}[{name!r}]", name, cache[layer][name], axis_order)
            for name in token_leaves
            if name in cache[layer]
        ]
        if leaves:
            yield layer, leaves


def _describe_leaf(label: str, name: str, leaf: Any, axis_order: Sequence[int]) -> _DenseLeaf:
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if len(shape) < 2 or 0 in shape:
        raise CacheMismatchError(
            f"{label} has shape {list(shape)}, which has no value for each row and token; "
            "leave it out of token_leaves"
        )
    sharding = getattr(leaf, "sharding", None)
    local_shape = shape if sharding is None else tuple(sharding.shard_shape(shape))
    axes = tuple(list(axis_order).index(logical) for logical in range(4)) if len(shape) == 4 else (0, 1)
    return _DenseLeaf(name, shape, local_shape, dtype, axes)


def _rows_of(layer: str, leaves: Sequence[_DenseLeaf], block_size: int, window: int | None) -> _Rows:
    found = {(leaf.shape[leaf.axes[_TOKEN]], leaf.local_shape[leaf.axes[_BATCH]]) for leaf in leaves}
    if len(found) > 1:
        raise CacheMismatchError(
            f"the leaves of {layer} differ in rows or token slots: {', '.join(map(str, leaves))}; correct "
            "axis_order, leave out of token_leaves what does not belong to tokens, or shard rows alike"
        )
    num_slots, num_rows = found.pop()
    if num_slots % block_size:
        raise ConfigError(
            f"{layer} has rows of {num_slots} token slots, which blocks of {block_size} do not divide; "
            f"make the cache {-(-num_slots // block_size) * block_size} slots long, or choose a divisor"
        )
    return _Rows(_spec_of(leaves, block_size, window), num_slots, num_rows)


def _spec_of(
    leaves: Sequence[_DenseLeaf], block_size: int, window: int | None
) -> FullAttentionSpec | SlidingWindowSpec:
    keys, values = leaves[0], leaves[1] if len(leaves) > 1 else leaves[0]
    num_heads, head_size = _heads(keys)
    shared = (block_size, num_heads, head_size, keys.dtype)
    page_bytes = block_size * sum(leaf.bits_per_token() for leaf in leaves) // 8
    head_size_v = _heads(values)[1]
    if window is None:
        return FullAttentionSpec(*shared, page_size_bytes=page_bytes, head_size_v=head_size_v)
    return SlidingWindowSpec(*shared, window, page_size_bytes=page_bytes, head_size_v=head_size_v)


def _heads(leaf: _DenseLeaf) -> tuple[int, int]:
    """Heads of one token and their size."""
    if len(leaf.axes) == 4:
        return leaf.shape[leaf.axes[_HEAD]], leaf.shape[leaf.axes[_DIM]]
    return 1, int(np.prod(leaf.shape[2:]))


def _require_described(
    cache: DenseCache, layers: Collection[str], token_leaves: Sequence[str], windows: Mapping[str, int]
) -> None:
    if not layers:
        raise ConfigError(
            f"no layer of {sorted(cache)} has a leaf called {' or '.join(token_leaves)}; "
            "name the leaves with token_leaves"
        )
    unknown = sorted(set(windows) - set(layers))
    if unknown:
        raise ConfigError(f"windows names layers without a cache: {unknown}; those are {sorted(layers)}")
