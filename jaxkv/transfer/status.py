"""What an op reports: how many blocks it moved, how many it refused, which first, and why."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import final

import numpy as np
import numpy.typing as npt


@final
class StatusEntry(IntEnum):
    """Entries of the int32 status array, as ``ffi/status.h`` defines them."""

    MOVED = 0
    BAD_BLOCK = 1
    REPEATED = 2
    BAD_ADDRESS = 3
    BAD_GEOMETRY = 4
    NO_POOL = 5
    NO_MEMORY = 6
    CANCELLED = 7
    NOT_PINNED = 8
    FIRST_REFUSED = 9
    ELAPSED_US = 10


STATUS_SIZE = len(StatusEntry)

_REASONS = {
    StatusEntry.BAD_BLOCK: "block id outside the group",
    StatusEntry.REPEATED: "block named twice in one write",
    StatusEntry.BAD_ADDRESS: "record outside the pool or the staging array",
    StatusEntry.BAD_GEOMETRY: "plans and leaves contradict each other",
    StatusEntry.NO_POOL: "host pool closed, unknown or of another process",
    StatusEntry.NO_MEMORY: "no memory for the copy's bookkeeping",
    StatusEntry.CANCELLED: "cancelled before it began",
    StatusEntry.NOT_PINNED: "host pool that the system would not pin for a device",
}


def make_status(**counts: int) -> npt.NDArray[np.int32]:
    """A status array with the entries named in lower case, zero elsewhere."""
    status = np.zeros(STATUS_SIZE, np.int32)
    for name, count in counts.items():
        status[StatusEntry[name.upper()]] = min(count, np.iinfo(np.int32).max)
    return status


def explain_refusals(counts: Sequence[int], block_ids: npt.NDArray[np.int32]) -> str | None:
    """The refusals of a status (as a list) in words, or ``None`` if there were none."""
    if not any(counts[entry] for entry in _REASONS):
        return None
    reasons = [f"{counts[entry]} x {text}" for entry, text in _REASONS.items() if counts[entry]]
    first = counts[StatusEntry.FIRST_REFUSED]
    return f"blocks refused: {', '.join(reasons)}; the first is block_ids[{first}], block {block_ids[first]}"
