"""Checks a transfer before anything is dispatched, and turns it into padded arrays. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import jax
import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from jaxkv.errors import BlockIdError, CacheMismatchError, SlotError
from jaxkv.host_pool import ADDRESS_UNIT_BYTES
from jaxkv.slots import Slot, Slots

_SMALLEST_BUCKET = 8


@final
@dataclass(frozen=True, slots=True)
class Entries:
    """What one program is given: int32 block ids and pool addresses, padded with -1 and 0 to a bucket."""

    block_ids: npt.NDArray[np.int32]
    addresses: npt.NDArray[np.int32]
    num_blocks: int


def bucket_size(count: int) -> int:
    """The power of two that ``count`` entries are padded to, so that few lengths are ever compiled."""
    return max(_SMALLEST_BUCKET, 1 << (count - 1).bit_length())


def only_device(leaves: Sequence[jax.Array]) -> jax.Device:
    """The device that holds all ``leaves``; ``CacheMismatchError`` if there is not just one."""
    if any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, leaves))):
        raise CacheMismatchError(
            "a BlockTransfer moves concrete arrays and cannot be called inside jit; "
            "use jaxkv.transfer.offload and restore there"
        )
    devices: set[jax.Device] = set().union(*[leaf.sharding.device_set for leaf in leaves])
    if len(devices) != 1:
        raise CacheMismatchError(
            f"the cache leaves of one group lie on {len(devices)} devices, but were registered on one; "
            "register the caches as they are now"
        )
    return devices.pop()


def check_block_ids(block_ids: ArrayLike, num_blocks: int) -> npt.NDArray[np.int32]:
    """``block_ids`` as int32, if every one is -1 or in ``range(num_blocks)``; else ``BlockIdError``."""
    try:
        ids = np.asarray(block_ids)
    except (TypeError, ValueError) as error:
        raise BlockIdError(f"block ids must be concrete whole numbers of shape (n,): {error}") from error
    if ids.size == 0:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BlockIdError(
            f"block ids must be whole numbers of shape (n,), got {ids.dtype} of shape {ids.shape}"
        )
    outside = (ids < -1) | (ids >= num_blocks)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise BlockIdError(
            f"block_ids[{at}] is {ids[at]}, but the group has blocks 0 to {num_blocks - 1}; -1 skips an entry"
        )
    return ids.astype(np.int32)


def check_no_repeats(block_ids: npt.NDArray[np.int32]) -> None:
    """Raises ``BlockIdError`` if a block is named twice: which bytes it should hold would be open."""
    ids = np.sort(block_ids[block_ids >= 0])
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if repeated.size:
        raise BlockIdError(f"block {ids[repeated[0]]} is named twice in one restore; name each block once")


def check_first_block(first_block: int) -> None:
    """Raises ``BlockIdError`` unless ``first_block`` is a whole number, 0 or more."""
    if not isinstance(first_block, int | np.integer) or first_block < 0:
        raise BlockIdError(f"first_block counts from the first chunk and cannot be {first_block!r}")


def as_slots(slots: Sequence[Slot], slot_bytes: int) -> Slots:
    """``slots`` as arrays, if each is a chunk of ``slot_bytes``; else ``SlotError``."""
    sizes = {slots.num_bytes} if isinstance(slots, Slots) else {slot.num_bytes for slot in slots}
    if slots and sizes != {slot_bytes}:
        wrong = next(slot for slot in slots if slot.num_bytes != slot_bytes)
        raise SlotError(
            f"{wrong} holds {wrong.num_bytes} bytes, a chunk of this group takes {slot_bytes}; "
            "reserve slots with BlockTransfer.reserve() for the same group"
        )
    return Slots.of(slots, slot_bytes)


def check_enough_slots(slots: Slots, num_entries: int, blocks_per_chunk: int) -> None:
    """Raises ``SlotError`` unless ``slots`` are chunks enough."""
    needed = -(-num_entries // blocks_per_chunk)
    if needed > len(slots):
        raise SlotError(
            f"{num_entries} blocks, counted from the start of the first chunk, need {needed} slots of "
            f"{blocks_per_chunk} blocks, got {len(slots)}"
        )


def check_slots_differ(slots: Slots) -> None:
    """Raises ``SlotError`` if a slot is named twice: two chunks would be written over each other."""
    offsets = np.sort(slots.offsets)
    if (offsets[1:] == offsets[:-1]).any():
        raise SlotError("a slot is named twice in one offload; give each chunk a slot of its own")


def make_entries(
    block_ids: npt.NDArray[np.int32],
    slot_addresses: ArrayLike,
    record_bytes: int,
    blocks_per_chunk: int,
    first_block: int,
) -> Entries:
    """Pads checked block ids and finds the address of each entry's record.

    Entry ``j`` is block ``first_block + j`` counted from the start of the first chunk; chunks hold
    ``blocks_per_chunk`` records one after another.
    """
    count = len(block_ids)
    ids = np.full(bucket_size(count), -1, np.int32)
    ids[:count] = block_ids
    chunk, within = np.divmod(first_block + np.arange(count), blocks_per_chunk)
    addresses = np.zeros(len(ids), np.int32)
    bases = np.asarray(slot_addresses, np.int64)
    addresses[:count] = bases[chunk] + within * (record_bytes // ADDRESS_UNIT_BYTES)
    return Entries(ids, addresses, int(np.count_nonzero(block_ids >= 0)))


def no_entries(num_entries: int) -> Entries:
    """As many entries, all of them skipped."""
    return Entries(np.full(num_entries, -1, np.int32), np.zeros(num_entries, np.int32), 0)
