"""A transfer under way and how it ended. Knows counts and time, not arrays of caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.keys import GroupId
from jaxkv.transfer.status import StatusEntry, explain_refusals

Status = jax.Array | npt.NDArray[np.int32]


@final
@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a transfer ended: bytes of blocks moved, seconds of copying, and what went wrong, if anything."""

    num_bytes: int
    elapsed_s: float
    error: str | None = None


@final
class Ticket:
    """One transfer. ``wait`` may be called any number of times, from any thread."""

    def __init__(
        self,
        status: Status,
        group: GroupId,
        block_ids: npt.NDArray[np.int32],
        block_bytes: int,
        on_end: Callable[[Ticket], None],
    ) -> None:
        self._status: Status | None = status
        self._group = group
        self._block_ids = block_ids
        self._block_bytes = block_bytes
        self._on_end = on_end
        self._lock = threading.Lock()
        self._result: TransferResult | None = None

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        is_ready = getattr(self._status, "is_ready", None)  # jax.Array does not declare it
        return is_ready is None or bool(is_ready())

    def wait(self) -> TransferResult:
        """The result, once the transfer has ended. A failed transfer is a result, not an exception."""
        with self._lock:
            if self._result is None:
                assert self._status is not None
                self._result = self._read(self._status)
                self._status = None
                self._on_end(self)
            return self._result

    def _read(self, status: Status) -> TransferResult:
        try:
            counts = np.asarray(status).tolist()
        except Exception as error:  # Whatever XLA raises is how this transfer ended.
            return TransferResult(0, 0.0, f"group {self._group}: the program failed: {error}")
        moved, wanted = counts[StatusEntry.MOVED], int(np.count_nonzero(self._block_ids >= 0))
        error_text = explain_refusals(counts, self._block_ids)
        if error_text is None and moved != wanted:
            error_text = f"{moved} blocks moved, {wanted} were asked for"
        return TransferResult(
            moved * self._block_bytes,
            counts[StatusEntry.ELAPSED_US] * 1e-6,
            error_text and f"group {self._group}: {error_text}",
        )
