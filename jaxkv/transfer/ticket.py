"""A transfer under way and how it ended. Knows counts and time, not arrays of caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import jax
import numpy as np
import numpy.typing as npt
from numpy.typing import DTypeLike

from jaxkv.host_pool import load_native
from jaxkv.keys import GroupId
from jaxkv.transfer.checks import Entries
from jaxkv.transfer.status import StatusEntry, explain_refusals


@runtime_checkable
class PendingStatus(Protocol):
    """A status that is no array yet; ``np.asarray`` waits for it."""

    def is_ready(self) -> bool:
        """Whether it would not wait."""

    def cancel(self) -> None:
        """Let what has not begun not begin."""

    def __array__(
        self, dtype: DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[np.int32]: ...


Status = jax.Array | npt.NDArray[np.int32] | PendingStatus


@final
@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a transfer ended: bytes of blocks moved, seconds of copying, and what went wrong, if anything.

    ``cancelled``: nothing went wrong, but it was called off in time; what it was to write is as it was, or
    written in part.
    """

    num_bytes: int
    elapsed_s: float
    error: str | None = None
    cancelled: bool = False


@final
@dataclass(frozen=True, slots=True)
class Move:
    """One program of a transfer: its status to come, what it was given, bytes of one of its blocks.

    ``num_copied_leaves`` were given to be written in place and were copied. ``where`` names the device, where
    there are several.
    """

    status: Status
    entries: Entries
    block_bytes: int
    num_copied_leaves: int = 0
    where: str | None = None

    def done(self) -> bool:
        """Whether ``read`` would return at once."""
        is_ready = getattr(self.status, "is_ready", None)  # jax.Array does not declare it
        return is_ready is None or bool(is_ready())

    def read(self) -> TransferResult:
        """How the program ended, once it has."""
        try:
            counts = np.asarray(self.status).tolist()
        except Exception as error:  # Whatever XLA raises is how this program ended.
            return TransferResult(0, 0.0, self._tell(f"the program failed: {error}"))
        moved, wanted = counts[StatusEntry.MOVED], self.entries.num_blocks
        error_text = explain_refusals(counts, self.entries.block_ids)
        if error_text is None and moved != wanted:
            error_text = f"{moved} blocks moved, {wanted} were asked for"
        return TransferResult(
            moved * self.block_bytes,
            counts[StatusEntry.ELAPSED_US] * 1e-6,
            error_text and self._tell(error_text),
            counts[StatusEntry.CANCELLED] > 0,
        )

    def cancel(self) -> None:
        """Let the program not begin, if it has not."""
        if isinstance(self.status, PendingStatus):
            self.status.cancel()
        else:
            load_native().cancel_call(self.entries.call_number)

    def _tell(self, text: str) -> str:
        return text if self.where is None else f"{self.where}: {text}"


def read_moves(group: GroupId, moves: Sequence[Move]) -> TransferResult:
    """All programs of a transfer together. They run side by side, so the slowest says how long it took."""
    results = [move.read() for move in moves]
    errors = [result.error for result in results if result.error is not None]
    if len(results) == 1 and not errors:
        return results[0]
    return TransferResult(
        sum(result.num_bytes for result in results),
        max((result.elapsed_s for result in results), default=0.0),
        f"group {group}: {'; '.join(errors)}" if errors else None,
        bool(errors) and all(result.error is None or result.cancelled for result in results),
    )


@final
class Ticket:
    """One transfer of a group. ``wait`` may be called any number of times, from any thread."""

    def __init__(self, group: GroupId, moves: Sequence[Move], on_end: Callable[[Ticket], None]) -> None:
        self._group = group
        self._moves: Sequence[Move] = moves
        self._on_end = on_end
        self._lock = threading.Lock()
        self._result: TransferResult | None = None
        self._cancelled = False

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return all(move.done() for move in self._moves)

    def cancel(self) -> None:
        """Let what has not begun not begin; ``wait`` tells whether that came in time. Waits for nothing."""
        # Without the lock, which a thread that waits holds. Whoever comes second forgets the numbers.
        moves = self._moves
        numbers = {move.entries.call_number for move in moves}
        self._cancelled = True
        for move in moves:
            move.cancel()
        if self._result is not None:
            _forget(numbers)

    def wait(self) -> TransferResult:
        """The result, once the transfer has ended. A failed transfer is a result, not an exception."""
        with self._lock:
            if self._result is None:
                self._result = read_moves(self._group, self._moves)
                if self._cancelled:
                    _forget({move.entries.call_number for move in self._moves})
                self._moves = ()
                self._on_end(self)
            return self._result


def _forget(call_numbers: Collection[int]) -> None:
    for number in call_numbers:
        load_native().forget_call(number)
