"""Decides how an arena is cut into slabs. ``ffi/slots.h`` hands out the slots.

Slabs are equal. A slab serves one slot size at a time and goes back when its slots are free, so that groups
whose slots differ in size share one byte budget. No slot crosses a slab.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from jaxkv.errors import ConfigError

PAGE_BYTES = 4096
"""Slots of at least this size start at a multiple of it, as direct I/O and device registration want."""
SLOT_UNIT_BYTES = 512
"""Every slot starts at a multiple of this."""
_WISHED_SLABS = 16
_MAX_SLOTS_TRIED = 256
_TRADED_FOR_LARGER = 1024


def slot_stride(slot_bytes: int) -> int:
    """Bytes a slot of ``slot_bytes`` takes from the arena, the padding that keeps slots aligned included."""
    if not isinstance(slot_bytes, int | np.integer) or slot_bytes < 1:
        raise ConfigError(f"a slot needs a whole number of bytes, at least 1, got {slot_bytes!r}")
    unit = PAGE_BYTES if slot_bytes >= PAGE_BYTES else SLOT_UNIT_BYTES
    return -(-slot_bytes // unit) * unit


def choose_slab_bytes(capacity_bytes: int, slot_sizes: Collection[int]) -> int:
    """The slab size that wastes least of ``capacity_bytes``, where the worst served slot size counts.

    A slab holds the largest slot at least once. Where the arena is large enough there are 16 slabs or more,
    so that sizes can trade them; the smaller, the better they can. For one size alone the larger are better,
    though they leave up to a thousandth of the arena unused: the bookkeeping of their slots lies together.
    Raises ``ConfigError`` if the largest slot does not fit at all.
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

    most_usable = max(map(usable_bytes, fitting))
    if len(strides) == 1:
        enough = most_usable - capacity_bytes // _TRADED_FOR_LARGER
        return max(slab_bytes for slab_bytes in fitting if usable_bytes(slab_bytes) >= enough)
    return min(slab_bytes for slab_bytes in fitting if usable_bytes(slab_bytes) == most_usable)
