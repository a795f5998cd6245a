"""Moves blocks of a whole group: from one device, or from all devices of a mesh that hold a part."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import final

import jax
import numpy as np
from jax.sharding import Mesh

from jaxkv.errors import ConfigError
from jaxkv.records import GroupPages, GroupRecord
from jaxkv.transfer.backends import PageMover, TransferBackend
from jaxkv.transfer.checks import Entries, only_device
from jaxkv.transfer.status import make_status
from jaxkv.transfer.ticket import Move, Status

Waves = Sequence[Collection[int]]
"""Leaves, by index, that one program restores, and then those of the next. Without waves one restores all."""

_log = logging.getLogger(__name__)


@contextmanager
def _outside_meshes() -> Iterator[None]:
    """Programs of one device each, whatever mesh the caller has set: JAX would refuse them inside it."""
    if jax.sharding.get_mesh().empty:
        yield
    else:
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            yield


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

    def prefetch(self, entries: Entries) -> list[Move]:
        """Start bringing records to where the last transfer was, ahead of a restore. Nothing where that gains
        nothing, or the blocks are spread over several devices."""
        return []

    @abstractmethod
    def place(self, leaves: Mapping[int, jax.Array] | None = None) -> Hashable:
        """Where records of these leaves, or of the last transfer's, wait once prefetched; for leaves that lie
        on several devices a place of its own, since what waits on one is never of all."""

    @abstractmethod
    def forget_prefetched(self, leaves: Mapping[int, jax.Array], entries: Entries) -> None:
        """Restore these records to ``leaves`` from their slots, whatever anybody has prefetched."""

    @abstractmethod
    def warm_up(self, leaves: Mapping[int, jax.Array], num_entries: int) -> dict[int, jax.Array]:
        """Compile what transfers padded to ``num_entries`` run. Consumes ``leaves``; returns them."""


@final
class OneDeviceMover(GroupMover):
    """Leaves that lie whole on one device."""

    def __init__(self, backend: TransferBackend, pages: GroupPages, waves: Waves) -> None:
        self._backend = backend
        self._pages = pages
        self.mover = backend.mover(pages)
        self._waves = [
            (part, self.mover if part is pages else backend.mover(part)) for part in _cut(pages, waves)
        ]
        self._seen_shardings: list[jax.sharding.Sharding] = []
        self._device: jax.Device | None = None

    def prefetch(self, entries: Entries) -> list[Move]:
        """See ``GroupMover``."""
        if self._device is None:
            return []
        status = self.mover.prefetch(self._device, entries)
        return [] if status is None else [Move(status, entries, self._pages.block_bytes)]

    def place(self, leaves: Mapping[int, jax.Array] | None = None) -> Hashable:
        """See ``GroupMover``. Records of another size would not lie where they are looked for."""
        if leaves is not None:
            self._reachable(leaves)
        return self._device, self._pages.record_bytes

    def forget_prefetched(self, leaves: Mapping[int, jax.Array], entries: Entries) -> None:
        """See ``GroupMover``."""
        self._reachable(leaves)
        assert self._device is not None
        self.mover.forget_prefetched(self._device, entries)

    @_outside_meshes()
    def offload(self, leaves: Mapping[int, jax.Array], entries: Entries) -> list[Move]:
        """See ``GroupMover``."""
        given = self._reachable(leaves)
        return [Move(self.mover.offload(given, entries), entries, self._pages.block_bytes)]

    @_outside_meshes()
    def restore(
        self, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[dict[int, jax.Array], list[Move]]:
        """See ``GroupMover``."""
        self._reachable(leaves)
        written, moves = dict(leaves), list[Move]()
        with _waits_if_broken_off(moves):
            for pages, mover in self._waves:
                given = [leaves[index] for index in pages.leaves]

                def describe(status: Status, num_copied: int, pages: GroupPages = pages) -> Move:
                    return Move(status, entries, pages.block_bytes, num_copied)

                written.update(
                    zip(pages.leaves, _restore(mover, given, entries, moves, describe), strict=True)
                )
        return written, moves

    @_outside_meshes()
    def warm_up(self, leaves: Mapping[int, jax.Array], num_entries: int) -> dict[int, jax.Array]:
        """See ``GroupMover``."""
        self.mover.warm_up_offload(self._reachable(leaves), num_entries)
        written = dict(leaves)
        for pages, mover in self._waves:
            given = [leaves[index] for index in pages.leaves]
            written.update(zip(pages.leaves, mover.warm_up_restore(given, num_entries), strict=True))
        return written

    def _reachable(self, leaves: Mapping[int, jax.Array]) -> list[jax.Array]:
        given = [leaves[index] for index in self._pages.leaves]
        shardings = [leaf.sharding for leaf in given]
        if shardings != self._seen_shardings:  # As a rule the same objects as the last time.
            device = only_device(given)
            self._backend.require_reachable(device)
            self._seen_shardings, self._device = shardings, device
        return given


@final
@dataclass(frozen=True, slots=True)
class Station:
    """A part of a record on one device, the ``turn``-th of ``num_turns`` that copy it out by turns."""

    device_id: int
    pages: GroupPages
    mover: PageMover
    turn: int
    num_turns: int

    def take_turn(self, entries: Entries) -> Entries:
        """The entries this device copies out: every one where it is the only holder."""
        return entries if self.num_turns == 1 else entries.take_turn(self.turn, self.num_turns)

    def leaves(self, parts: Mapping[int, Mapping[int, jax.Array]]) -> list[jax.Array]:
        """Those of ``parts``, by leaf index and device, that it moves."""
        return [parts[index][self.device_id] for index in self.pages.leaves]

    def cut(self, backend: TransferBackend, waves: Waves) -> list[Station]:
        """The same part, as ``waves`` cut it."""
        return [
            self if part is self.pages else replace(self, pages=part, mover=backend.mover(part))
            for part in _cut(self.pages, waves)
        ]

    def move(self, status: Status, num_copied_leaves: int = 0, *, entries: Entries) -> Move:
        """What its program did, told with the device's number."""
        where = f"device {self.device_id}"
        return Move(status, entries, self.pages.block_bytes, num_copied_leaves, where)


@final
class MeshMover(GroupMover):
    """Leaves spread over a mesh: a program for each device of one data shard that this process drives.

    Every program sees one device only, so nothing orders them among each other and no process waits for
    another. Holders of the same bytes copy them out by turns and all copy them in.

    Raises ``ConfigError`` where no device of this process holds a part of the data shard.
    """

    def __init__(
        self,
        backend: TransferBackend,
        record: GroupRecord,
        data_shard: int,
        devices: Sequence[jax.Device],
        waves: Waves,
    ) -> None:
        for device in devices:
            backend.require_reachable(device)
        self._devices = {device.id: device for device in devices}
        self.stations = [
            Station(device_id, pages, mover, turn, len(holders))
            for part in record.parts
            for pages, holders in zip(part.shards, part.holders[data_shard], strict=True)
            for mover in [backend.mover(pages)]
            for turn, device_id in enumerate(holders)
            if device_id in self._devices
        ]
        if not self.stations:
            raise ConfigError(
                f"data shard {data_shard} of the caches lies on no device of process {jax.process_index()}; "
                "move it in the processes that hold it"
            )
        by_station = [station.cut(backend, waves) for station in self.stations]
        self._waves = [
            station for wave in zip_longest(*by_station) for station in wave if station is not None
        ]

    def place(self, leaves: Mapping[int, jax.Array] | None = None) -> Hashable:
        """See ``GroupMover``. Nothing was prefetched to here; what waits is of transfers of one device."""
        return self

    def forget_prefetched(self, leaves: Mapping[int, jax.Array], entries: Entries) -> None:
        """See ``GroupMover``."""
        for station in self.stations:
            station.mover.forget_prefetched(self._devices[station.device_id], entries)

    @_outside_meshes()
    def offload(self, leaves: Mapping[int, jax.Array], entries: Entries) -> list[Move]:
        """See ``GroupMover``."""
        parts = {index: _take_apart(leaf) for index, leaf in leaves.items()}
        moves: list[Move] = []
        with _waits_if_broken_off(moves):
            for station in self.stations:
                mine = station.take_turn(entries)
                if mine.num_blocks:
                    status = station.mover.offload(station.leaves(parts), mine)
                    moves.append(station.move(status, entries=mine))
        return moves

    @_outside_meshes()
    def restore(
        self, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[dict[int, jax.Array], list[Move]]:
        """See ``GroupMover``."""
        parts = {index: _take_apart(leaf) for index, leaf in leaves.items()}
        moves: list[Move] = []
        with _waits_if_broken_off(moves):
            for station in self._waves:
                given, describe = station.leaves(parts), partial(station.move, entries=entries)
                written = _restore(station.mover, given, entries, moves, describe)
                for index, leaf in zip(station.pages.leaves, written, strict=True):
                    parts[index][station.device_id] = leaf
        return _put_together(leaves, parts), moves

    @_outside_meshes()
    def warm_up(self, leaves: Mapping[int, jax.Array], num_entries: int) -> dict[int, jax.Array]:
        """See ``GroupMover``."""
        parts = {index: _take_apart(leaf) for index, leaf in leaves.items()}
        for station in self.stations:
            station.mover.warm_up_offload(station.leaves(parts), num_entries)
        for station in self._waves:
            written = station.mover.warm_up_restore(station.leaves(parts), num_entries)
            for index, leaf in zip(station.pages.leaves, written, strict=True):
                parts[index][station.device_id] = leaf
        return _put_together(leaves, parts)


def _cut(pages: GroupPages, waves: Waves) -> list[GroupPages]:
    """``pages`` by ``waves``, without those that hold none of its leaves."""
    if len(waves) <= 1:
        return [pages]
    return [part for wave in waves if (part := pages.of_leaves(wave)).leaves]


def _restore(
    mover: PageMover,
    given: list[jax.Array],
    entries: Entries,
    moves: list[Move],
    describe: Callable[[Status, int], Move],
) -> list[jax.Array]:
    """Copies blocks into ``given`` and adds the move, told by its status and how many leaves were copied.

    Once another program has consumed leaves, an error is a failed move and not raised: the others would be
    lost with it.
    """
    try:
        written, status = mover.restore(given, entries)
    except Exception:
        if not moves or _count_alive(given) < len(given):
            raise
        _log.exception("a part of a block could not be restored")
        moves.append(describe(make_status(), 0))
        return given
    moves.append(describe(status, _count_alive(given)))
    return written


@contextmanager
def _waits_if_broken_off(moves: Sequence[Move]) -> Iterator[None]:
    """An error leaves no program behind that still uses slots which the caller is about to unpin."""
    try:
        yield
    except BaseException:
        for move in moves:
            move.read()
        raise


def make_group_mover(
    backend: TransferBackend,
    record: GroupRecord,
    data_shard: int,
    devices: Sequence[jax.Device],
    waves: Waves = (),
) -> GroupMover:
    """The mover of a group: ``devices`` are those of this process that hold parts of it."""
    if not record.is_spread:
        return OneDeviceMover(backend, record.parts[0].shards[0], waves)
    return MeshMover(backend, record, data_shard, devices, waves)


def _count_alive(donated: Sequence[jax.Array]) -> int:
    """Leaves that were copied: XLA deletes what it reuses."""
    return sum(not leaf.is_deleted() for leaf in donated)


def _take_apart(leaf: jax.Array) -> dict[int, jax.Array]:
    """What each device of this process holds of ``leaf``, as arrays of their own over the same buffers."""
    return {shard.device.id: shard.data for shard in leaf.addressable_shards}


def _put_together(
    leaves: Mapping[int, jax.Array], parts: Mapping[int, dict[int, jax.Array]]
) -> dict[int, jax.Array]:
    """``leaves``, by index, over the new ``parts``, by index and device."""
    _retire(leaves, parts)
    return {
        index: jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, list(parts[index].values())
        )
        for index, leaf in leaves.items()
    }


def _retire(leaves: Mapping[int, jax.Array], parts: Mapping[int, dict[int, jax.Array]]) -> None:
    """Leave ``leaves`` deleted for JAX, although parts of other data shards go on as they are.

    JAX takes an array for deleted once its first part is. One that has lost later parts only passes its
    checks, and a program given it may end the process or never end. So the first part always changes hands.
    """
    kept: dict[int, list[int]] = {}
    for index, leaf in leaves.items():
        if not leaf.is_deleted():
            kept.setdefault(leaf.addressable_shards[0].device.id, []).append(index)
    for device, indices in kept.items():
        old = [leaves[index].addressable_shards[0].data for index in indices]
        untouched = [place for place, index in enumerate(indices) if parts[index][device] is old[place]]
        handed_over = _hand_over([old[place] for place in untouched])
        for place, part in zip(untouched, handed_over, strict=True):
            parts[indices[place]][device] = part
        for part in old:
            part.delete()  # What XLA copied, because a view of it lives on, and then only the name of it.


_hand_over = jax.jit(lambda parts: parts, donate_argnums=0)
"""The same buffers as new arrays: an aliased program that does nothing costs no copy."""
