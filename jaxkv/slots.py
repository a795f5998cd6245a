"""Names reserved ranges of a pool, one by one or thousands as arrays. Knows no pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final, overload

import numpy as np
import numpy.typing as npt

from jaxkv.errors import SlotError

Int64s = npt.NDArray[np.int64]
_INT64 = np.iinfo(np.int64)


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """A reserved range of a pool. Its ``epoch`` is unique in the process, so a freed slot is found out.

    Slots pickle; on the way to other processes and back they stay the same slots.
    """

    offset: int
    num_bytes: int
    epoch: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Slots(Sequence[Slot]):
    """Slots of one size, held as two int64 arrays of shape ``(n,)``: a ``Slot`` is made when it is asked for.

    Equal if they name the same slots in the same order. They pickle as ``Slot`` does.
    """

    offsets: Int64s
    epochs: Int64s
    num_bytes: int

    def __post_init__(self) -> None:
        for name in ("offsets", "epochs"):
            object.__setattr__(self, name, _read_only(getattr(self, name)))
        if self.offsets.ndim != 1 or self.offsets.shape != self.epochs.shape:
            raise SlotError(
                f"slots need an offset and an epoch each, got shapes {self.offsets.shape} and "
                f"{self.epochs.shape}"
            )

    @classmethod
    def of(cls, slots: Sequence[Slot], num_bytes: int) -> Slots:
        """``slots`` as arrays. Raises ``SlotError`` for one that does not hold ``num_bytes``."""
        offsets, epochs, sizes = slot_columns(slots)
        wrong = np.flatnonzero(sizes != num_bytes)
        if wrong.size:
            raise SlotError(f"{slots[int(wrong[0])]} does not hold {num_bytes} bytes; name slots of one size")
        return slots if isinstance(slots, Slots) else cls(offsets, epochs, num_bytes)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Slot: ...
    @overload
    def __getitem__(self, index: slice) -> Slots: ...
    def __getitem__(self, index: int | slice) -> Slot | Slots:
        if isinstance(index, slice):
            return Slots(self.offsets[index], self.epochs[index], self.num_bytes)
        return Slot(int(self.offsets[index]), self.num_bytes, int(self.epochs[index]))

    def __iter__(self) -> Iterator[Slot]:
        for offset, epoch in zip(self.offsets.tolist(), self.epochs.tolist(), strict=True):
            yield Slot(offset, self.num_bytes, epoch)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slots):
            return NotImplemented
        return (
            self.num_bytes == other.num_bytes
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.epochs, other.epochs)
        )

    def __hash__(self) -> int:
        return hash((self.offsets.tobytes(), self.epochs.tobytes()))

    def __reduce__(self) -> tuple[type[Slots], tuple[Int64s, Int64s, int]]:
        return Slots, (self.offsets, self.epochs, self.num_bytes)


def slot_columns(slots: Sequence[Slot]) -> tuple[Int64s, Int64s, Int64s]:
    """Offsets, epochs and numbers of bytes of ``slots``, which may differ in size.

    A number beyond 64 bits becomes the nearest within, which no slot of a pool ever has.
    """
    if isinstance(slots, Slots):
        return slots.offsets, slots.epochs, np.full(len(slots), slots.num_bytes, np.int64)
    rows = [(slot.offset, slot.epoch, slot.num_bytes) for slot in slots]
    try:
        table = np.array(rows, np.int64)
    except OverflowError:
        table = np.array(rows, object).clip(_INT64.min, _INT64.max).astype(np.int64)
    offsets, epochs, num_bytes = np.ascontiguousarray(table.reshape(-1, 3).T)
    return offsets, epochs, num_bytes


def _read_only(values: Int64s) -> Int64s:
    """A view that cannot be written. Without gaps, as compiled code wants it."""
    view = np.ascontiguousarray(values, np.int64).view()
    view.flags.writeable = False
    return view
