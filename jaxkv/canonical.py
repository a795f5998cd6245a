"""Turns the cache arrays of a model into canonical tensors and pages. Knows specs; copies nothing.

What vLLM's ``CanonicalKVCaches`` is to torch tensors: every layout becomes rows of bytes, one row a block. A
JAX array is a value without a stable pointer, so what is kept are leaf *positions* in the cache pytree, and
each call passes the arrays of that moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, final

import jax
import numpy as np

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.keys import GroupId
from jaxkv.layer_pages import find_layer_pages
from jaxkv.layout import BlockView, LayoutHint
from jaxkv.pytree import LeafPositions, find_leaves, inspect_arrays, inspect_shapes
from jaxkv.records import GroupPages, GroupRecord, PlacedPage, plan_local, plan_record
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, LayerSpec

Hints = Mapping[str, LayoutHint | Sequence[LayoutHint]]
"""By layer name: one hint for all leaves of the layer, or one for each in leaf order."""


@final
@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """One leaf as rows of bytes, one row a block, padding included (vLLM: ``CanonicalKVCacheTensor``)."""

    num_blocks: int
    page_size_bytes: int


@final
@dataclass(frozen=True, slots=True)
class CanonicalRef:
    """Bytes one layer stores per block in one tensor, without padding (vLLM: ``CanonicalKVCacheRef``)."""

    tensor_idx: int
    page_size_bytes: int
    layer_name: str


@final
@dataclass(frozen=True, slots=True)
class CanonicalKVCaches:
    """The layout of one model's caches (vLLM: ``CanonicalKVCaches``). Holds no array.

    ``tensors`` has one entry per unique leaf; ``group_data_refs[g]`` and ``groups[g].placements`` go in layer
    order, then leaf order. Both, and ``groups``, say what one device holds: with caches on a mesh, its shard.
    ``records[g]`` says what a slot of a host pool holds of a block, whichever devices share it.
    ``fingerprint`` names everything that decides what the bytes of a record mean, and leaves out the number
    of blocks: equal fingerprints may exchange blocks. ``per_shard_layers`` says, by layer name, why a layer's
    pages depend on the number of devices although portable pages were asked for.
    """

    config: KVCacheConfig
    tensors: tuple[CanonicalTensor, ...]
    group_data_refs: tuple[tuple[CanonicalRef, ...], ...]
    groups: tuple[GroupPages, ...]
    records: tuple[GroupRecord, ...]
    fingerprint: str
    positions: LeafPositions
    per_shard_layers: Mapping[str, str] = field(hash=False)

    def leaves(self, kv_caches: Mapping[str, Any]) -> list[jax.Array]:
        """The unique leaves of ``kv_caches``, which must be shaped as the caches that were registered.

        Cheap enough for every step. Raises ``CacheMismatchError`` where structure, shape or dtype
        differ, ``DeletedCacheError`` where an array was donated.
        """
        return self.positions.read(kv_caches)

    def group_leaves(self, kv_caches: Mapping[str, Any], group: GroupId) -> list[jax.Array]:
        """Those of ``leaves`` that ``group`` touches, in the order of ``groups[group].leaves``."""
        leaves = self.leaves(kv_caches)
        return [leaves[index] for index in self.groups[group].leaves]

    def replace(
        self, kv_caches: Mapping[str, Any], group: GroupId, new_leaves: Sequence[jax.Array]
    ) -> dict[str, Any]:
        """``kv_caches`` with the leaves of ``group`` replaced wherever they stand, in the same containers.

        ``new_leaves`` go in the order of ``groups[group].leaves``. The arrays they replace may be deleted.
        """
        indices = self.groups[group].leaves
        if len(new_leaves) != len(indices):
            raise CacheMismatchError(
                f"group {group} has {len(indices)} leaves, got {len(new_leaves)} to put back; "
                "pass them in the order of groups[group].leaves"
            )
        return self.positions.write(kv_caches, dict(zip(indices, new_leaves, strict=True)))


def canonicalize(
    kv_caches: Mapping[str, Any],
    config: KVCacheConfig,
    hints: Hints | None = None,
    *,
    portable_pages: bool = False,
    processes: Collection[int] | None = None,
) -> CanonicalKVCaches:
    """Derive the layout of ``kv_caches``: ``{layer_name: leaf | tuple of leaves | dict of leaves}``.

    Leaves that are one buffer become one tensor. ``hints`` by layer name say what shapes cannot. On a mesh,
    ``num_blocks`` of the config counts the blocks of one data shard, and its specs describe the whole model.
    With ``portable_pages`` records hold the pages of the unsharded cache where that can be proven.
    ``processes`` are those that share the host pool, by default this one alone.

    Raises ``CacheMismatchError``, ``DeletedCacheError`` or ``ConfigError`` on the first thing
    that is not exactly as ``config`` says.
    """
    positions = find_leaves(kv_caches, config, inspect_arrays(processes))
    return _derive(positions, config, hints or {}, portable_pages=portable_pages)


def canonicalize_shapes(
    kv_caches: Mapping[str, Any], config: KVCacheConfig, hints: Hints | None = None
) -> CanonicalKVCaches:
    """As ``canonicalize`` for leaves that only have ``shape`` and ``dtype`` (``jax.ShapeDtypeStruct``).

    The same object in two places is one leaf; all count as whole on one device.
    """
    positions = find_leaves(kv_caches, config, inspect_shapes)
    return _derive(positions, config, hints or {}, portable_pages=False)


def _derive(
    positions: LeafPositions, config: KVCacheConfig, hints: Hints, *, portable_pages: bool
) -> CanonicalKVCaches:
    unknown = sorted(set(hints) - set(positions.of_layer))
    if unknown:
        raise ConfigError(f"hints name layers that no group has: {unknown}; name layers of the config")
    placed = [_place_pages(group, positions, hints) for group in config.groups]
    per_shard: dict[str, str] = {}
    if portable_pages:
        placed = [[_make_portable(page, per_shard) for page in group] for group in placed]
    views: dict[int, BlockView] = {}
    for page in (page for group in placed for page in group):
        views.setdefault(page.leaf, page.part.view)
    unique = positions.unique
    groups = [
        plan_local(group.num_blocks, pages, unique)
        for group, pages in zip(config.groups, placed, strict=True)
    ]
    return CanonicalKVCaches(
        config=config,
        tensors=tuple(CanonicalTensor(v.num_blocks, v.block_bytes) for _, v in sorted(views.items())),
        group_data_refs=tuple(
            tuple(CanonicalRef(page.leaf, len(page.part.page), page.layer_name) for page in group)
            for group in placed
        ),
        groups=tuple(groups),
        records=tuple(plan_record(local, pages, unique) for local, pages in zip(groups, placed, strict=True)),
        fingerprint=_fingerprint(config, placed, positions),
        positions=positions,
        per_shard_layers=per_shard,
    )


def _make_portable(page: PlacedPage, per_shard: dict[str, str]) -> PlacedPage:
    reason = page.part.why_per_shard
    if reason is None and len(page.held_shards) < page.part.view.num_shards:
        reason = (
            f"{len(page.held_shards)} of {page.part.view.num_shards} parts of each block lie on devices of "
            "the processes that share the pool; share it between all of them"
        )
    if reason is not None:
        per_shard.setdefault(page.layer_name, reason)
    return replace(page, is_portable=reason is None)


def _place_pages(group: KVCacheGroupSpec, positions: LeafPositions, hints: Hints) -> list[PlacedPage]:
    placed: list[PlacedPage] = []
    for name in group.layer_names:
        leaves = positions.of_layer[name]
        layer_hints = _hints_of(name, len(leaves), hints)
        parts = find_layer_pages(group.spec, positions.leaves_of(name), group.num_blocks, layer_hints)
        placed += [PlacedPage(name, leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
    _require_disjoint(placed, positions)
    return placed


def _hints_of(layer_name: str, num_leaves: int, hints: Hints) -> Sequence[LayoutHint]:
    given = hints.get(layer_name, LayoutHint())
    if isinstance(given, LayoutHint):
        return [given] * num_leaves
    if not isinstance(given, Sequence) or not all(isinstance(hint, LayoutHint) for hint in given):
        raise ConfigError(
            f"hints of layer {layer_name!r} must be a LayoutHint or a list of them, not {given!r}"
        )
    if len(given) != num_leaves:
        raise ConfigError(
            f"layer {layer_name!r} has {num_leaves} leaves and {len(given)} hints; "
            "give one LayoutHint for all of them, or one for each in leaf order"
        )
    return given


def _require_disjoint(placed: Sequence[PlacedPage], positions: LeafPositions) -> None:
    """Pages of one group share no byte. Equal views map blocks alike, so comparing page ranges decides."""
    by_start = sorted(placed, key=lambda page: (page.leaf, page.part.page.start))
    for page, following in pairwise(by_start):
        if page.leaf != following.leaf:
            continue
        names = f"layers {page.layer_name!r} and {following.layer_name!r} of one group"
        if page.part.view != following.part.view:
            raise CacheMismatchError(
                f"{names} split {positions.unique[page.leaf]} into blocks in different ways; "
                "give both the same block_axis and kernel_blocks_per_block"
            )
        if page.part.page.stop > following.part.page.start:
            raise CacheMismatchError(
                f"{names} use the same bytes of {positions.unique[page.leaf]}; "
                "give each its own array, or its own bytes with LayoutHint(page_offset_bytes=...)"
            )


def _fingerprint(
    config: KVCacheConfig, placed: Sequence[Sequence[PlacedPage]], positions: LeafPositions
) -> str:
    """Digest of what the bytes of a record mean: specs, layers, dtypes, page shapes; not where they lie."""
    lines = []
    for group, pages in zip(config.groups, placed, strict=True):
        lines.append(_describe_spec(group.spec))
        lines += [_describe_page(page, positions) for page in pages]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _describe_page(page: PlacedPage, positions: LeafPositions) -> str:
    leaf, view, cut = positions.unique[page.leaf], page.part.view, page.part.page
    described = f"{page.layer_name!r} {leaf.dtype.name}{list(view.page_shape)}"
    if len(cut) != view.block_bytes:
        described += f"[{cut.start}:{cut.stop}]"
    if view.num_shards > 1 and not page.is_portable:
        described += f" in parts {[axis.parts for axis in view.axes]}, of which {list(page.held_shards)}"
    return described


def _describe_spec(spec: LayerSpec) -> str:
    values = []
    for entry in fields(spec):
        value = getattr(spec, entry.name)
        if entry.name == "dtype":
            value = np.dtype(value).name
        elif entry.name == "dtypes":
            value = [np.dtype(dtype).name for dtype in value]
        values.append(f"{entry.name}={value}")
    return f"{type(spec).__name__}({', '.join(values)})"
