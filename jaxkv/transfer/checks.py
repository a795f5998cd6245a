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
from jaxkv.host_pool import ADDRESS_UNIT_BYTES, load_native
from jaxkv.slots import Int64s, Slot, Slots

_SMALLEST_BUCKET = 8
_MOST_BLOCKS = np.uint64(np.iinfo(np.int64).max)


@final
@dataclass(frozen=True, slots=True)
class Entries:
    """What one program is given, as one int32 array: generation of the pool, number of the call, block ids,
    addresses.

    Ids and addresses are padded with -1 and 0 to a bucket. ``num_blocks`` ids are not -1.
    """

    numbers: npt.NDArray[np.int32]
    num_blocks: int

    @property
    def call_number(self) -> int:
        """What the call is called off by; another for every transfer of the process."""
        return int(self.numbers[1])

    @property
    def block_ids(self) -> npt.NDArray[np.int32]:
        """-1 skips an entry."""
        return self.numbers[2 : 1 + len(self.numbers) // 2]

    @property
    def addresses(self) -> npt.NDArray[np.int32]:
        """Where the records of the entries lie in the pool, in units of 512 bytes."""
        return self.numbers[1 + len(self.numbers) // 2 :]

    def take_turn(self, turn: int, num_turns: int) -> Entries:
        """Every ``num_turns``-th entry, the others skipped."""
        numbers = self.numbers.copy()
        mine = Entries(numbers, self.num_blocks).block_ids
        mine[np.arange(len(mine)) % num_turns != turn] = -1
        return Entries(numbers, int(np.count_nonzero(mine >= 0)))


def bucket_size(count: int) -> int:
    """The power of two that ``count`` entries are padded to, so that few lengths are ever compiled."""
    return max(_SMALLEST_BUCKET, 1 << (count - 1).bit_length())


def only_device(leaves: Sequence[jax.Array]) -> jax.Device:
    """The device that holds all ``leaves``; ``CacheMismatchError`` if there is not just one."""
    devices: set[jax.Device] = set().union(*[leaf.sharding.device_set for leaf in leaves])
    if len(devices) != 1:
        raise CacheMismatchError(
            f"the cache leaves of one group lie on {len(devices)} devices, but were registered on one; "
            "register the caches as they are now"
        )
    return devices.pop()


def check_block_ids(block_ids: ArrayLike, num_blocks: int) -> Int64s:
    """``block_ids`` as int64, if every one is -1 or in ``range(num_blocks)``; else ``BlockIdError``."""
    try:
        given = np.asarray(block_ids)
    except (TypeError, ValueError) as error:
        raise BlockIdError(f"block ids must be concrete whole numbers of shape (n,): {error}") from error
    if given.size == 0:
        return np.zeros(0, np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise BlockIdError(
            f"block ids must be whole numbers of shape (n,), got {given.dtype} of shape {given.shape}"
        )
    if given.dtype == np.uint64:
        given = np.minimum(given, _MOST_BLOCKS)
    ids = np.ascontiguousarray(given, np.int64)
    at = load_native().first_outside(ids, num_blocks)
    if at is not None:
        raise BlockIdError(
            f"block_ids[{at}] is {ids[at]}, but the group has blocks 0 to {num_blocks - 1}; -1 skips an entry"
        )
    return ids


def check_no_repeats(block_ids: Int64s) -> None:
    """Raises ``BlockIdError`` if a block is named twice: which bytes it should hold would be open."""
    at = load_native().first_repeated(block_ids)
    if at is not None:
        raise BlockIdError(f"block {block_ids[at]} is named twice in one restore; name each block once")


def check_first_block(first_block: int) -> int:
    """``first_block`` as Python counts, which does not overflow. Raises ``BlockIdError`` unless it is a whole
    number, 0 or more.
    """
    if not isinstance(first_block, int | np.integer) or first_block < 0:
        raise BlockIdError(f"first_block counts from the first chunk and cannot be {first_block!r}")
    return int(first_block)


def as_slots(slots: Sequence[Slot], slot_bytes: int) -> Slots:
    """``slots`` as arrays, if each is a chunk of ``slot_bytes``; else ``SlotError``."""
    if isinstance(slots, Slots) and slots.num_bytes == slot_bytes:
        return slots
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
    if load_native().first_repeated(slots.offsets) is not None:
        raise SlotError("a slot is named twice in one offload; give each chunk a slot of its own")


def make_entries(
    block_ids: Int64s,
    slot_addresses: Int64s,
    record_bytes: int,
    blocks_per_chunk: int,
    first_block: int,
    call: tuple[int, int],
) -> Entries:
    """Pads checked block ids and finds the address of each entry's record.

    ``call`` is the pool's generation, of which the addresses are, and the number of this call.

    Entry ``j`` is block ``first_block + j`` counted from the start of the first chunk; chunks hold
    ``blocks_per_chunk`` records one after another.
    """
    layout = blocks_per_chunk, first_block, record_bytes // ADDRESS_UNIT_BYTES
    num_entries = bucket_size(len(block_ids))
    return Entries(*load_native().make_entries(block_ids, slot_addresses, layout, call, num_entries))


def no_entries(num_entries: int) -> Entries:
    """As many entries, all of them skipped."""
    numbers = np.zeros(2 + 2 * num_entries, np.int32)
    numbers[2 : 2 + num_entries] = -1
    return Entries(numbers, 0)
