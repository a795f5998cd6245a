"""Chooses which way transfers of a CUDA device go, from what copies take on it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from jaxkv.errors import ConfigError

PATHS_VARIABLE = "JAXKV_CUDA_PATH"
"""The environment variable that settles which way transfers go: ``direct``, ``engine`` or ``kernel``."""
PROBE_BYTES = 16 << 20
COPY_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
BLOCK_COUNTS = (8, 16, 32, 64)
DIRECT_US = 10
"""What the model may wait for a transfer that is one kernel. To stage it keeps the model waiting for about
half of that, and the result twice as long."""
PATHS_VERSION = 2
"""Another for another way of measuring or choosing, so that what was kept before is measured anew."""
_NEVER = 1 << 62
_MOST_BLOCKS = 1 << 16
_REPEATS = 3
_GOOD_ENOUGH = 0.95
_ENGINE_GOOD_ENOUGH = 0.75
"""Copy engines may be slower than a kernel by this much: they leave the model all multiprocessors."""

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class CudaPaths:
    """Which way a transfer goes.

    Smaller than ``direct_below_bytes`` it is one kernel between leaves and host memory. Larger ones pass
    through staging memory, and on in copies: those of at least ``engine_from_bytes`` on average are the copy
    engines', others a kernel's. Kernels that reach host memory have ``host_blocks`` blocks of threads.
    """

    direct_below_bytes: int
    engine_from_bytes: int
    host_blocks: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least, most = (1, _MOST_BLOCKS) if name == "host_blocks" else (0, _NEVER)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name} is {value!r}; give a whole number from {least} to {most}")

    def __str__(self) -> str:
        if self.direct_below_bytes >= _NEVER:
            return f"always one kernel of {self.host_blocks} blocks of threads"
        engines = f"copy engines from {self.engine_from_bytes >> 10} KiB a copy on, below that a kernel"
        if self.engine_from_bytes >= _NEVER:
            engines = "a kernel, never the copy engines"
        return (
            f"one kernel below {self.direct_below_bytes >> 10} KiB, else staged, by {engines}; "
            f"{self.host_blocks} blocks of threads"
        )


@final
@dataclass(frozen=True, slots=True)
class CopySample:
    """``PROBE_BYTES`` took ``microseconds`` in copies of ``copy_bytes``, by a kernel of so many blocks of
    threads, or by the copy engines where that is 0."""

    to_host: bool
    copy_bytes: int
    host_blocks: int
    microseconds: int


FORCED = {
    "direct": CudaPaths(_NEVER, 0, 32),
    "engine": CudaPaths(0, 0, 32),
    "kernel": CudaPaths(0, _NEVER, 32),
}
"""By what ``JAXKV_CUDA_PATH`` may say."""


def sample_link(time_us: Callable[[bool, int, int], int]) -> list[CopySample]:
    """What copies take by length and way, the best of a few; ``time_us`` is ``CopyProbe.time_us``."""
    return [
        CopySample(
            to_host,
            copy_bytes,
            blocks,
            max(1, min(time_us(to_host, copy_bytes, blocks) for _ in range(_REPEATS))),
        )
        for to_host in (True, False)
        for copy_bytes in COPY_BYTES
        for blocks in (0, *BLOCK_COUNTS)
    ]


def choose_paths(samples: Iterable[CopySample]) -> CudaPaths:
    """The way for every size, from samples of both directions; pure.

    As few blocks of threads as are as fast as any number; copy engines from the length on at which they are
    nearly as fast as those in both directions; directly what the link carries in ``DIRECT_US``.
    """
    took = {(s.to_host, s.copy_bytes, s.host_blocks): s.microseconds for s in samples}
    by_count = {blocks: sum(us for key, us in took.items() if key[2] == blocks) for blocks in BLOCK_COUNTS}
    least = min(by_count.values())
    host_blocks = next(blocks for blocks in BLOCK_COUNTS if by_count[blocks] * _GOOD_ENOUGH <= least)
    engine_from = next(
        (
            copy_bytes
            for copy_bytes in COPY_BYTES
            if all(
                took[to_host, longer, 0] * _ENGINE_GOOD_ENOUGH <= took[to_host, longer, host_blocks]
                for to_host in (True, False)
                for longer in COPY_BYTES
                if longer >= copy_bytes
            )
        ),
        _NEVER,
    )
    return CudaPaths(PROBE_BYTES * DIRECT_US // min(took.values()), engine_from, host_blocks)


def find_paths(key: str, measure: Callable[[], list[CopySample]]) -> tuple[CudaPaths, str]:
    """The paths of the device that ``key`` names, and how they were found: forced, from the file, measured.

    Raises ``ConfigError`` if ``JAXKV_CUDA_PATH`` says what it cannot.
    """
    forced = os.environ.get(PATHS_VARIABLE)
    if forced:
        if forced not in FORCED:
            raise ConfigError(f"{PATHS_VARIABLE} is {forced!r}; use one of {', '.join(FORCED)}, or unset it")
        return FORCED[forced], f"forced by {PATHS_VARIABLE}={forced}"
    known = _read_file()
    if key in known:
        return known[key], f"measured before, kept in {_file()}"
    paths = choose_paths(measure())
    _write_file(known | {key: paths})
    return paths, "measured now"


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jaxkv" / "cuda_paths.json"


def _read_file() -> dict[str, CudaPaths]:
    """What is known of devices. A file that is not there, or not as it should be, knows none."""
    try:
        return {key: CudaPaths(**paths) for key, paths in json.loads(_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_file(known: Mapping[str, CudaPaths]) -> None:
    """Whole or not at all, since other processes may read it."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        draft = _file().with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({key: asdict(paths) for key, paths in known.items()}, indent=2) + "\n")
        draft.replace(_file())
    except OSError as error:
        _log.info("cannot keep what was measured in %s: %s", _file(), error)
