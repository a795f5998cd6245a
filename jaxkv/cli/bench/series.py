"""Repeated timings and what is made of them: medians, spreads and ratios. Prints nothing."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any, final

Tell = Callable[[str], None]
"""Takes a line that says what is going on."""


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """Repeated timings of one thing, in seconds."""

    name: str
    seconds: tuple[float, ...]
    target_s: float | None = None

    @property
    def median_s(self) -> float:
        """The middle of all."""
        return median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """What a tenth were faster than, and what a tenth were slower than."""
        return tenths(self.seconds)

    @property
    def met(self) -> bool:
        """Whether the median is within the target, if there is one."""
        return self.target_s is None or self.median_s <= self.target_s

    def as_json(self) -> dict[str, Any]:
        """As plain values; times in seconds."""
        low, high = self.spread_s
        return {
            "name": self.name,
            "median_s": self.median_s,
            "tenth_s": low,
            "nine_tenths_s": high,
            "count": len(self.seconds),
            "target_s": self.target_s,
        }


@final
@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times better one thing was than another: one number a round, in which both were timed."""

    name: str
    values: tuple[float, ...]
    at_least: float | None = None

    @property
    def median(self) -> float:
        """The middle of all."""
        return median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median reaches the target, if there is one, to the two digits that tables show."""
        return self.at_least is None or round(self.median, 2) >= self.at_least

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        low, high = tenths(self.values)
        return {
            "name": self.name,
            "median": self.median,
            "tenth": low,
            "nine_tenths": high,
            "count": len(self.values),
            "at_least": self.at_least,
        }


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """What a tenth of ``values`` lie below, and what a tenth lie above."""
    if len(values) < 2:
        return values[0], values[0]
    cuts = quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


@final
@dataclass(frozen=True, slots=True)
class Contender:
    """A way to do something. ``run`` is timed; ``prepare`` comes before it and is not."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def interleave(
    contenders: Sequence[Contender], repeats: int, *, burst: int = 1
) -> Mapping[str, tuple[float, ...]]:
    """Seconds by name, ``burst`` numbers a round.

    Every round times each contender, ``burst`` times on end, in an order drawn anew, so that a machine that
    is busy for a while is busy for all of them. A first round, in which programs are compiled and pages
    touched, does not count.
    """
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {one.name: [] for one in contenders}
    for one in contenders:
        _time(one)
    for _ in range(repeats):
        for one in draw.sample(contenders, len(contenders)):
            seconds[one.name] += [_time(one) for _ in range(burst)]
    return {name: tuple(times) for name, times in seconds.items()}


def _time(contender: Contender) -> float:
    contender.prepare()
    start = perf_counter()
    contender.run()
    return perf_counter() - start


@contextmanager
def undisturbed() -> Iterator[None]:
    """The garbage collector goes on, but does not walk over what was there before, as servers have it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
