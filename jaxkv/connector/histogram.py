"""Counts of values by size, in buckets fixed beforehand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

BYTES_BUCKETS = (1e6, 5e6, 10e6, 20e6, 40e6, 60e6, 80e6, 100e6, 150e6, 200e6)
"""Upper bounds for bytes of one transfer, as vLLM's."""
LOOKUP_BUCKETS = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0)
"""Upper bounds for seconds one lookup takes, as vLLM's."""
WAIT_BUCKETS = (1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds for seconds a request waits for the answer of a lookup, as vLLM's."""


@final
@dataclass(frozen=True, slots=True)
class HistogramStats:
    """``counts[i]`` values were at most ``bounds[i]`` and above the bound before it.

    The last count, which has no bound, is of values above all of them. ``total`` is the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def num_values(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@final
class Histogram:
    """Counts values; ``bounds`` ascend."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramStats:
        """The counts as they stand."""
        return HistogramStats(self._bounds, tuple(self._counts), self._total)
