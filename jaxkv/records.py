"""Where the pages of a block stand in its record: what one device holds, and what a slot of a pool holds.

The record of a block is its pages one after another, leaf after leaf; a page that several devices share is
their parts one after another, or, where pages are portable, the page of the unsharded cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

from jaxkv.errors import CacheMismatchError
from jaxkv.layer_pages import LayerPage
from jaxkv.layout import BlockView, CacheLeaf, plan_page, plan_shard
from jaxkv.page_plan import PagePlan

RECORD_ALIGNMENT = 512
"""A block record takes a multiple of this many bytes, so that a 32-bit address reaches 1 TiB of pool."""


@final
@dataclass(frozen=True, slots=True)
class PagePlacement:
    """One copy between a leaf, by its index among the unique leaves, and a block record."""

    leaf: int
    plan: PagePlan


@final
@dataclass(frozen=True, slots=True)
class GroupPages:
    """What one device holds of the blocks of one group, and where that stands in a record.

    ``leaves`` are the unique leaves the group touches, in the order of first use; ``leaf_shapes``
    is what one device holds of each, ``block_axes`` the axes of each that count blocks. A record
    takes ``record_bytes``, a multiple of ``RECORD_ALIGNMENT``; ``block_bytes`` of it are copied. Writing a
    record clears its bytes from ``clear_from`` on.
    """

    num_blocks: int
    placements: tuple[PagePlacement, ...]
    leaves: tuple[int, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]
    block_axes: tuple[tuple[int, ...], ...]
    block_bytes: int
    record_bytes: int
    clear_from: int

    def of_leaves(self, leaves: Collection[int]) -> GroupPages:
        """What stands in these leaves alone, at the same places of the record."""
        kept = [place for place, leaf in enumerate(self.leaves) if leaf in leaves]
        placements = tuple(placement for placement in self.placements if placement.leaf in leaves)
        return replace(
            self,
            placements=placements,
            leaves=tuple(self.leaves[place] for place in kept),
            leaf_shapes=tuple(self.leaf_shapes[place] for place in kept),
            block_axes=tuple(self.block_axes[place] for place in kept),
            block_bytes=sum(placement.plan.page_bytes for placement in placements),
        )


Holders = tuple[tuple[tuple[int, ...], ...], ...]
"""Ids of the devices that hold each part of a block, by data shard and part; empty for any one device."""


@final
@dataclass(frozen=True, slots=True)
class RecordPart:
    """Leaves of one group that devices share out alike.

    ``shards[s]`` are the pages of part ``s`` at their places in the record; ``holders[d][s]`` the ids of the
    devices that hold it for data shard ``d``, all with the same bytes.
    """

    shards: tuple[GroupPages, ...]
    holders: Holders


@final
@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What a slot of a host pool holds of one block of a group, whichever devices it comes from."""

    num_blocks: int
    num_data_shards: int
    block_bytes: int
    record_bytes: int
    parts: tuple[RecordPart, ...]

    @property
    def is_spread(self) -> bool:
        """Whether several devices hold the blocks, in parts or whole."""
        return bool(self.parts[0].holders)


@final
@dataclass(frozen=True, slots=True)
class PlacedPage:
    """A layer's page in one leaf. ``is_portable`` where the record holds it as if no device shared it."""

    layer_name: str
    leaf: int
    part: LayerPage
    is_portable: bool = False

    @property
    def held_shards(self) -> tuple[int, ...]:
        """The parts of a block that some device holds, in order."""
        view, shards = self.part.view, self.part.shards
        return tuple(sorted({view.shard_of(cell) for _, cell in shards.cells})) or (0,)

    @property
    def num_bytes(self) -> int:
        """Bytes of the record."""
        return len(self.part.page) * len(self.held_shards)

    @property
    def holders(self) -> Holders:
        """As in ``RecordPart``."""
        view, shards = self.part.view, self.part.shards
        if not shards.is_spread:
            return ()
        held = {shard: place for place, shard in enumerate(self.held_shards)}
        found: list[list[list[int]]] = [[[] for _ in held] for _ in range(shards.grid[view.block_axes[0]])]
        for device, cell in shards.cells:
            found[view.data_shard_of(cell)][held[view.shard_of(cell)]].append(device)
        return tuple(tuple(map(tuple, of_data_shard)) for of_data_shard in found)

    def plans(self, leaf: CacheLeaf, record_offset: int) -> Iterator[list[PagePlan]]:
        """The copies of each held part, of a page that begins at ``record_offset``."""
        view = self.part.view
        if self.is_portable and view.num_shards > 1:
            for shard in self.held_shards:
                yield _shift(_plan_shard_once(view, shard), record_offset)
        else:
            local = plan_page(leaf, view, self.part.page, record_offset)
            for held in range(len(self.held_shards)):
                yield _shift(local, held * len(self.part.page))


@lru_cache(maxsize=1024)
def _plan_shard_once(view: BlockView, shard: int) -> tuple[PagePlan, ...]:
    """Layers are alike, and registering them should not cost a plan for each of them on each device."""
    return tuple(plan_shard(view, shard, record_offset=0))


def _shift(plans: Sequence[PagePlan], num_bytes: int) -> list[PagePlan]:
    return [replace(plan, record_offset=plan.record_offset + num_bytes) for plan in plans]


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def plan_local(num_blocks: int, placed: Sequence[PlacedPage], leaves: Sequence[CacheLeaf]) -> GroupPages:
    """The pages of a group as one device holds them, in a record of its own."""
    plans = []
    block_bytes = 0
    for page in placed:
        plans += [
            PagePlacement(page.leaf, plan)
            for plan in plan_page(leaves[page.leaf], page.part.view, page.part.page, block_bytes)
        ]
        block_bytes += len(page.part.page)
    record_bytes = _round_up(block_bytes)
    return _make_pages(num_blocks, placed, leaves, plans, (block_bytes, record_bytes, block_bytes))


def plan_record(local: GroupPages, placed: Sequence[PlacedPage], leaves: Sequence[CacheLeaf]) -> GroupRecord:
    """The record of a block of a group over all devices that hold it; ``local`` is what one of them holds.

    Raises ``CacheMismatchError`` where leaves of the group lie on different devices, or their blocks are
    split over them in different ways.
    """
    _require_same_devices(placed, leaves)
    if not placed[0].part.shards.is_spread:
        whole = RecordPart((local,), ())
        return GroupRecord(local.num_blocks, 1, local.block_bytes, local.record_bytes, (whole,))
    return _plan_spread_record(local.num_blocks, placed, leaves)


def _plan_spread_record(
    num_blocks: int, placed: Sequence[PlacedPage], leaves: Sequence[CacheLeaf]
) -> GroupRecord:
    alike: dict[Holders, list[tuple[PlacedPage, int]]] = {}
    block_bytes = 0
    for page in placed:
        holders = page.holders
        _require_like_data_shards(leaves[page.leaf], holders)
        alike.setdefault(holders, []).append((page, block_bytes))
        block_bytes += page.num_bytes
    record_bytes = _round_up(block_bytes)
    parts: list[RecordPart] = []
    for holders, pages in alike.items():
        copied = sum(len(page.part.page) for page, _ in pages)
        shards: list[GroupPages] = []
        for plans_of_pages in zip(*(page.plans(leaves[page.leaf], at) for page, at in pages), strict=True):
            plans = [
                PagePlacement(page.leaf, plan)
                for (page, _), plans_of_page in zip(pages, plans_of_pages, strict=True)
                for plan in plans_of_page
            ]
            clear_from = record_bytes if parts or shards else block_bytes
            sizes = (copied, record_bytes, clear_from)
            shards.append(_make_pages(num_blocks, [page for page, _ in pages], leaves, plans, sizes))
        parts.append(RecordPart(tuple(shards), holders))
    return GroupRecord(num_blocks, len(parts[0].holders), block_bytes, record_bytes, tuple(parts))


def _make_pages(
    num_blocks: int,
    placed: Sequence[PlacedPage],
    leaves: Sequence[CacheLeaf],
    plans: Sequence[PagePlacement],
    sizes: tuple[int, int, int],
) -> GroupPages:
    views = {page.leaf: page.part.view for page in placed}
    block_bytes, record_bytes, clear_from = sizes
    return GroupPages(
        num_blocks=num_blocks,
        placements=tuple(plans),
        leaves=tuple(views),
        leaf_shapes=tuple(leaves[leaf].local_shape for leaf in views),
        block_axes=tuple(view.block_axes for view in views.values()),
        block_bytes=block_bytes,
        record_bytes=record_bytes,
        clear_from=clear_from,
    )


def _require_like_data_shards(leaf: CacheLeaf, holders: Holders) -> None:
    """A record names no data shard, so all that lie here at all must lie here in the same parts."""
    for data_shard, devices_of_parts in enumerate(holders):
        missing = [part for part, devices in enumerate(devices_of_parts) if not devices]
        if 0 < len(missing) < len(devices_of_parts):
            raise CacheMismatchError(
                f"{leaf}: parts {missing} of the blocks of data shard {data_shard} lie on devices of other "
                "processes, but those of other data shards lie here; name all processes in processes=... and "
                "share one pool, or order the mesh so that a process holds the same parts of each"
            )


def _require_same_devices(placed: Sequence[PlacedPage], leaves: Sequence[CacheLeaf]) -> None:
    first = _data_shards(placed[0])
    for page in placed:
        if _data_shards(page) != first:
            raise CacheMismatchError(
                f"{leaves[placed[0].leaf]} and {leaves[page.leaf]} of one group lie on different devices, or "
                "split their blocks over them in different ways; put all leaves of a group on one mesh and "
                "shard their block axes alike"
            )


def _data_shards(page: PlacedPage) -> Mapping[int, int]:
    return {device: page.part.view.data_shard_of(cell) for device, cell in page.part.shards.cells}
