"""Moves blocks of a whole group: from one device, or from all devices of a mesh that hold a part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import jax
import numpy as np

from jaxkv.records import GroupPages, GroupRecord
from jaxkv.transfer.backends import PageMover, TransferBackend
from jaxkv.transfer.checks import Entries, only_device
from jaxkv.transfer.ticket import Move, Status


class GroupMover(ABC):
    """Moves blocks between the leaves of a group, wherever they lie, and pinned slots. Checks no ids."""

    @abstractmethod
    def offload(self, leaves: Mapping[int, jax.Array], entries: Entries) -> list[Move]:
        """Start copying blocks out of ``leaves`` (by index), which stay the caller's."""

    @abstractmethod
    def restore(
        self, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[dict[int, jax.Array], list[Move]]:
        """Start copying blocks in. Consumes ``leaves``; returns the new ones, by index."""


@final
class OneDeviceMover(GroupMover):
    """Leaves that lie whole on one device."""

    def __init__(self, backend: TransferBackend, pages: GroupPages) -> None:
        self._backend = backend
        self._pages = pages
        self.mover = backend.mover(pages)

    def offload(self, leaves: Mapping[int, jax.Array], entries: Entries) -> list[Move]:
        """See ``GroupMover``."""
        given = self._reachable(leaves)
        return [Move(self.mover.offload(given, entries), entries.block_ids, self._pages.block_bytes)]

    def restore(
        self, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[dict[int, jax.Array], list[Move]]:
        """See ``GroupMover``."""
        given = self._reachable(leaves)
        written, status = self.mover.restore(given, entries)
        move = Move(status, entries.block_ids, self._pages.block_bytes, _count_alive(given))
        return dict(zip(self._pages.leaves, written, strict=True)), [move]

    def _reachable(self, leaves: Mapping[int, jax.Array]) -> list[jax.Array]:
        given = [leaves[index] for index in self._pages.leaves]
        self._backend.require_reachable(only_device(given))
        return given


@final
@dataclass(frozen=True, slots=True)
class _Station:
    """A part of a record on one device, the ``turn``-th of ``num_turns`` that copy it out by turns."""

    device_id: int
    pages: GroupPages
    mover: PageMover
    turn: int
    num_turns: int

    def take_turn(self, entries: Entries) -> Entries:
        """The entries this device copies out: every one where it is the only holder."""
        if self.num_turns == 1:
            return entries
        mine = np.arange(len(entries.block_ids)) % self.num_turns == self.turn
        block_ids = np.where(mine, entries.block_ids, np.int32(-1))
        return Entries(block_ids, entries.addresses, int(np.count_nonzero(block_ids >= 0)))

    def leaves(self, parts: Mapping[int, Mapping[int, jax.Array]]) -> list[jax.Array]:
        """Those of ``parts``, by leaf index and device, that it moves."""
        return [parts[index][self.device_id] for index in self.pages.leaves]

    def move(self, status: Status, entries: Entries, num_copied_leaves: int = 0) -> Move:
        where = f"device {self.device_id}"
        return Move(status, entries.block_ids, self.pages.block_bytes, num_copied_leaves, where)


@final
class MeshMover(GroupMover):
    """Leaves spread over a mesh: a program for each device of one data shard that this process drives.

    Every program sees one device only, so nothing orders them among each other and no process waits for
    another. Holders of the same bytes copy them out by turns and all copy them in.
    """

    def __init__(
        self, backend: TransferBackend, record: GroupRecord, data_shard: int, devices: Sequence[jax.Device]
    ) -> None:
        for device in devices:
            backend.require_reachable(device)
        local = {device.id for device in devices}
        self._stations = [
            _Station(device_id, pages, mover, turn, len(holders))
            for part in record.parts
            for pages, holders in zip(part.shards, part.holders[data_shard], strict=True)
            for mover in [backend.mover(pages)]
            for turn, device_id in enumerate(holders)
            if device_id in local
        ]

    def offload(self, leaves: Mapping[int, jax.Array], entries: Entries) -> list[Move]:
        """See ``GroupMover``."""
        parts = {index: _take_apart(leaf) for index, leaf in leaves.items()}
        moves = []
        for station in self._stations:
            mine = station.take_turn(entries)
            # No entry at all is how programs are warmed up; then every one of them runs.
            if mine.num_blocks or not entries.num_blocks:
                moves.append(station.move(station.mover.offload(station.leaves(parts), mine), mine))
        return moves

    def restore(
        self, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[dict[int, jax.Array], list[Move]]:
        """See ``GroupMover``."""
        parts = {index: _take_apart(leaf) for index, leaf in leaves.items()}
        moves = []
        for station in self._stations:
            given = station.leaves(parts)
            written, status = station.mover.restore(given, entries)
            moves.append(station.move(status, entries, _count_alive(given)))
            for index, leaf in zip(station.pages.leaves, written, strict=True):
                parts[index][station.device_id] = leaf
        return {index: _put_together(leaf, parts[index]) for index, leaf in leaves.items()}, moves


def make_group_mover(
    backend: TransferBackend, record: GroupRecord, data_shard: int, devices: Sequence[jax.Device]
) -> GroupMover:
    """The mover of a group: ``devices`` are those of this process that hold parts of it."""
    if not record.is_spread:
        return OneDeviceMover(backend, record.parts[0].shards[0])
    return MeshMover(backend, record, data_shard, devices)


def _count_alive(donated: Sequence[jax.Array]) -> int:
    """Leaves that were copied: XLA deletes what it reuses."""
    return sum(not leaf.is_deleted() for leaf in donated)


def _take_apart(leaf: jax.Array) -> dict[int, jax.Array]:
    """What each device of this process holds of ``leaf``, as arrays of their own over the same buffers."""
    return {shard.device.id: shard.data for shard in leaf.addressable_shards}


def _put_together(leaf: jax.Array, parts: Mapping[int, jax.Array]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, list(parts.values()))
