"""Draws ``jaxkv bench memory``: seconds by pool size, and memory beside caches and pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxkv.cli.bench.memory_measure import MemoryFigures
from jaxkv.cli.replay_report import gib


def save_memory_plot(path: Path, figures: MemoryFigures) -> None:
    """A PNG with two panels."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_pools(left, figures)
    names = [peak.name for peak in figures.peaks]
    extra = [(peak.extra_bytes or 0) / 2**20 for peak in figures.peaks]
    bars = right.barh(names, extra, color=["#2563eb" if "jaxkv" in name else "#b0b7c3" for name in names])
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.invert_yaxis()
    right.set_xlabel("MiB beside caches and pool")
    right.set_title(f"Moving {figures.settings.moved_bytes / 2**20:.0f} MiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_pools(axes: Any, figures: MemoryFigures) -> None:
    places = range(len(figures.pools))
    series = (
        ("cold", [pool.cold_s for pool in figures.pools], "#93c5fd"),
        ("warm", [pool.warm.median_s for pool in figures.pools], "#2563eb"),
        ("np.ones, warm", [pool.numpy.median_s for pool in figures.pools], "#b0b7c3"),
    )
    for number, (name, seconds, colour) in enumerate(series):
        bars = axes.bar(
            [place + 0.27 * (number - 1) for place in places], seconds, 0.25, label=name, color=colour
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(list(places), [f"{gib(pool.num_bytes)} GiB" for pool in figures.pools])
    axes.set_ylabel("seconds")
    axes.set_title("Allocating and populating a pool")
    axes.legend(frameon=False, loc="upper left")
