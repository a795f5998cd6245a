"""Keeps Ctrl-C out of the middle of a step, where it could part the engine's books from the device."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Raise a Ctrl-C that arrives in the block at its end, even if it fails; a second one is raised at once.

    Does nothing outside the main thread, or where the program handles SIGINT in its own way.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pending = 0

    def note(_signum: int, _frame: FrameType | None) -> None:
        nonlocal pending
        pending += 1
        if pending > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pending:
            raise KeyboardInterrupt
