"""Turns the cache arrays of a model into canonical tensors and pages. Knows specs; copies nothing.

What vLLM's ``CanonicalKVCaches`` is to torch tensors: every layout becomes rows of bytes, one row a block. A
JAX array is a value without a stable pointer, so what is kept are leaf *positions* in the cache pytree, and
each call passes the arrays of that moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, final

import jax
import numpy as np

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.keys import GroupId
from jaxkv.layout import BlockView, LayerPage, LayoutHint, PagePlan, find_layer_pages, plan_page
from jaxkv.pytree import LeafPositions, find_leaves, identify_arrays
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, LayerSpec

RECORD_ALIGNMENT = 512
"""A block record takes a multiple of this many bytes, so that a 32-bit address reaches 1 TiB of pool."""


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
class PagePlacement:
    """One page of a block record: the index of its leaf among the unique leaves, and the copy."""

    leaf: int
    plan: PagePlan


@final
@dataclass(frozen=True, slots=True)
class GroupPages:
    """Where the pages of one group lie. The record of a block is its pages, one after another.

    ``leaves`` are the unique leaves the group touches, in the order of first use. ``block_bytes`` is what one
    block really holds, ``record_bytes`` what its record takes: a multiple of ``RECORD_ALIGNMENT``.
    """

    num_blocks: int
    placements: tuple[PagePlacement, ...]
    leaves: tuple[int, ...]
    block_bytes: int
    record_bytes: int


@final
@dataclass(frozen=True, slots=True)
class CanonicalKVCaches:
    """The layout of one model's caches (vLLM: ``CanonicalKVCaches``). Holds no array.

    ``tensors`` has one entry per unique leaf; ``group_data_refs[g]`` and ``groups[g].placements`` go in layer
    order, then leaf order. ``fingerprint`` names everything that decides what the bytes of a block mean, and
    leaves out the number of blocks: equal fingerprints may exchange blocks.
    """

    config: KVCacheConfig
    tensors: tuple[CanonicalTensor, ...]
    group_data_refs: tuple[tuple[CanonicalRef, ...], ...]
    groups: tuple[GroupPages, ...]
    fingerprint: str
    positions: LeafPositions

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
    hints: Mapping[str, LayoutHint] | None = None,
) -> CanonicalKVCaches:
    """Derive the layout of ``kv_caches``: ``{layer_name: leaf | tuple of leaves | dict of leaves}``.

    Leaves that are one buffer become one tensor. ``hints`` by layer name say what shapes cannot.
    Raises ``CacheMismatchError``, ``DeletedCacheError`` or ``ConfigError`` on the first thing
    that is not exactly as ``config`` says.
    """
    positions = find_leaves(kv_caches, config, identify_arrays)
    return _derive(positions, config, hints or {})


def canonicalize_shapes(
    kv_caches: Mapping[str, Any],
    config: KVCacheConfig,
    hints: Mapping[str, LayoutHint] | None = None,
) -> CanonicalKVCaches:
    """As ``canonicalize`` for leaves that only have ``shape`` and ``dtype`` (``jax.ShapeDtypeStruct``).

    The same object in two places is one leaf.
    """
    positions = find_leaves(kv_caches, config, _one_object_one_leaf)
    return _derive(positions, config, hints or {})


def _one_object_one_leaf(leaves: Sequence[Any], labels: Sequence[str]) -> list[int]:
    del labels
    return [id(leaf) for leaf in leaves]


@final
@dataclass(frozen=True, slots=True)
class _PlacedPage:
    layer_name: str
    leaf: int
    part: LayerPage


def _derive(
    positions: LeafPositions, config: KVCacheConfig, hints: Mapping[str, LayoutHint]
) -> CanonicalKVCaches:
    unknown = sorted(set(hints) - set(positions.of_layer))
    if unknown:
        raise ConfigError(f"hints name layers that no group has: {unknown}; name layers of the config")
    placed = [_place_pages(group, positions, hints) for group in config.groups]
    views: dict[int, BlockView] = {}
    for page in (page for group in placed for page in group):
        views.setdefault(page.leaf, page.part.view)
    return CanonicalKVCaches(
        config=config,
        tensors=tuple(CanonicalTensor(v.num_blocks, v.block_bytes) for _, v in sorted(views.items())),
        group_data_refs=tuple(
            tuple(CanonicalRef(page.leaf, len(page.part.page), page.layer_name) for page in group)
            for group in placed
        ),
        groups=tuple(
            _plan_group(group.num_blocks, pages, positions)
            for group, pages in zip(config.groups, placed, strict=True)
        ),
        fingerprint=_fingerprint(config, placed, positions),
        positions=positions,
    )


def _place_pages(
    group: KVCacheGroupSpec, positions: LeafPositions, hints: Mapping[str, LayoutHint]
) -> list[_PlacedPage]:
    placed: list[_PlacedPage] = []
    for name in group.layer_names:
        leaves = positions.of_layer[name]
        described = [positions.unique[leaf] for leaf in leaves]
        parts = find_layer_pages(group.spec, described, group.num_blocks, hints.get(name, LayoutHint()))
        placed += [_PlacedPage(name, leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
    _require_disjoint(placed, positions)
    return placed


def _require_disjoint(placed: Sequence[_PlacedPage], positions: LeafPositions) -> None:
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


def _plan_group(num_blocks: int, placed: Sequence[_PlacedPage], positions: LeafPositions) -> GroupPages:
    placements = []
    block_bytes = 0
    for page in placed:
        plan = plan_page(positions.unique[page.leaf], page.part.view, page.part.page, block_bytes)
        placements.append(PagePlacement(page.leaf, plan))
        block_bytes += plan.page_bytes
    return GroupPages(
        num_blocks=num_blocks,
        placements=tuple(placements),
        leaves=tuple(dict.fromkeys(page.leaf for page in placed)),
        block_bytes=block_bytes,
        record_bytes=-(-block_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT,
    )


def _fingerprint(
    config: KVCacheConfig, placed: Sequence[Sequence[_PlacedPage]], positions: LeafPositions
) -> str:
    """Digest of what the bytes of a record mean: specs, layers, dtypes, page shapes; not where they lie."""
    lines = []
    for group, pages in zip(config.groups, placed, strict=True):
        lines.append(_describe_spec(group.spec))
        for page in pages:
            dtype = positions.unique[page.leaf].dtype.name
            view, cut = page.part.view, page.part.page
            lines.append(f"{page.layer_name!r} {dtype}{list(view.page_shape)}[{cut.start}:{cut.stop}]")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _describe_spec(spec: LayerSpec) -> str:
    values = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "dtype":
            value = np.dtype(value).name
        elif field.name == "dtypes":
            value = [np.dtype(dtype).name for dtype in value]
        values.append(f"{field.name}={value}")
    return f"{type(spec).__name__}({', '.join(values)})"
