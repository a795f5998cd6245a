"""Divides an arena into slabs and slots. Pure bookkeeping: it touches no memory and takes no lock.

Slabs are equal. A slab serves one slot size at a time and goes back when its slots are free, so that groups
whose slots differ in size share one byte budget. No slot crosses a slab.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import final

import numpy as np

from jaxkv.errors import ConfigError

PAGE_BYTES = 4096
"""Slots of at least this size start at a multiple of it, as direct I/O and device registration want."""
SLOT_UNIT_BYTES = 512
"""Every slot starts at a multiple of this."""
_WISHED_SLABS = 16
_MAX_SLOTS_TRIED = 256


def slot_stride(slot_bytes: int) -> int:
    """Bytes a slot of ``slot_bytes`` takes from the arena, the padding that keeps slots aligned included."""
    if not isinstance(slot_bytes, int | np.integer) or slot_bytes < 1:
        raise ConfigError(f"a slot needs a whole number of bytes, at least 1, got {slot_bytes!r}")
    unit = PAGE_BYTES if slot_bytes >= PAGE_BYTES else SLOT_UNIT_BYTES
    return -(-slot_bytes // unit) * unit


def choose_slab_bytes(capacity_bytes: int, slot_sizes: Collection[int]) -> int:
    """The slab size that wastes least of ``capacity_bytes``, where the worst served slot size counts.

    A slab holds the largest slot at least once. Where the arena is large enough there are 16 slabs or more,
    so that sizes can trade them. Raises ``ConfigError`` if the largest slot does not fit at all.
    """
    strides = {slot_stride(size) for size in slot_sizes}
    largest = max(strides)
    if largest > capacity_bytes:
        raise ConfigError(
            f"a host pool of {capacity_bytes} bytes cannot hold one slot of {largest} bytes; "
            "give it at least that, better many times that"
        )
    most = max(1, min(capacity_bytes // _WISHED_SLABS // largest, _MAX_SLOTS_TRIED))
    candidates = {largest * count for count in range(1, most + 1)}
    # Smallest slot that is page aligned decides: a slab of whole pages keeps every slot aligned.
    candidates = {-(-size // PAGE_BYTES) * PAGE_BYTES for size in candidates}
    fitting = {size for size in candidates if size <= capacity_bytes} or {largest}

    def usable_bytes(slab_bytes: int) -> int:
        slabs = capacity_bytes // slab_bytes
        return min(slabs * (slab_bytes // stride) * stride for stride in strides)

    return min(fitting, key=lambda slab_bytes: (-usable_bytes(slab_bytes), slab_bytes))


@final
@dataclass(slots=True)
class _Slab:
    stride: int
    free_offsets: list[int]
    used: int = 0


@final
@dataclass(slots=True)
class SlabAllocator:
    """Hands out offsets of slots. ``capacity_bytes`` beyond the last whole slab stay unused."""

    capacity_bytes: int
    slab_bytes: int
    used_bytes: int = field(default=0, init=False)
    _idle: list[int] = field(init=False)
    _slabs: dict[int, _Slab] = field(default_factory=dict, init=False)
    _with_room: dict[int, dict[int, None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.slab_bytes <= self.capacity_bytes:
            raise ConfigError(f"slabs of {self.slab_bytes} bytes do not fit {self.capacity_bytes} bytes")
        self._idle = list(range(self.num_slabs - 1, -1, -1))

    @property
    def num_slabs(self) -> int:
        """Slabs of the arena."""
        return self.capacity_bytes // self.slab_bytes

    def slots_per_slab(self, slot_bytes: int) -> int:
        """Slots of one size in one slab; 0 if they are too large for this cut of the arena."""
        return self.slab_bytes // slot_stride(slot_bytes)

    def max_slots(self, slot_bytes: int) -> int:
        """Slots of one size that the empty arena holds."""
        return self.num_slabs * self.slots_per_slab(slot_bytes)

    def num_free(self, slot_bytes: int) -> int:
        """Slots of one size that could be allocated now."""
        with_room = self._with_room.get(slot_stride(slot_bytes), {})
        in_use = sum(len(self._slabs[slab].free_offsets) for slab in with_room)
        return in_use + len(self._idle) * self.slots_per_slab(slot_bytes)

    def allocate(self, slot_bytes: int) -> int | None:
        """The offset of a slot, or ``None`` if there is none; from a slab in use before an idle one."""
        stride = slot_stride(slot_bytes)
        with_room = self._with_room.setdefault(stride, {})
        if not with_room:
            if not self._idle or stride > self.slab_bytes:
                return None
            self._open_slab(self._idle.pop(), stride)
        index = next(iter(with_room))
        slab = self._slabs[index]
        offset = slab.free_offsets.pop()
        slab.used += 1
        self.used_bytes += stride
        if not slab.free_offsets:
            del with_room[index]
        return offset

    def free(self, offset: int) -> None:
        """Take back a slot that ``allocate`` handed out; its slab becomes idle with its last slot."""
        index = self.slab_of(offset)
        slab = self._slabs[index]
        slab.free_offsets.append(offset)
        slab.used -= 1
        self.used_bytes -= slab.stride
        if slab.used == 0:
            self._with_room[slab.stride].pop(index, None)
            del self._slabs[index]
            self._idle.append(index)
        else:
            self._with_room[slab.stride][index] = None

    def slab_of(self, offset: int) -> int:
        """The slab a slot lies in."""
        return offset // self.slab_bytes

    def _open_slab(self, index: int, stride: int) -> None:
        start = index * self.slab_bytes
        count = self.slab_bytes // stride
        self._slabs[index] = _Slab(stride, [start + i * stride for i in range(count - 1, -1, -1)])
        self._with_room[stride][index] = None
