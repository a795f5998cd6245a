"""Draws ``jaxkv bench serve``: how many times faster each piece of work was with offloading on."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from jaxkv.cli.bench.series import tenths
from jaxkv.cli.bench.serve_command import ServeFigures

_TICKS = (0.05, 0.1, 0.2, 0.5, 0.7, 1, 2, 5, 10, 20, 50, 100, 200)


def save_serve_plot(path: Path, figures: ServeFigures) -> None:
    """A PNG with a bar for every comparison, on a logarithmic axis that begins at 1."""
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(figures.comparisons)), layout="constrained")
    axes = figure.add_subplot()
    for row, one in enumerate(figures.comparisons):
        low, high = tenths(one.ratio.values)
        middle = one.ratio.median
        axes.barh(
            row,
            middle - 1,
            0.5,
            left=1,
            xerr=((max(0.0, middle - low),), (max(0.0, high - middle),)),
            color="#2563eb" if middle >= 1 else "#d97706",
            ecolor="#4b5563",
        )
        right = max(1.0, high, one.at_least or 0.0)
        axes.annotate(f"{middle:.2f}", (right, row), (6, -4), textcoords="offset points")
        if one.at_least is not None:
            axes.vlines(one.at_least, row - 0.35, row + 0.35, color="#be123c", lw=2)
    axes.axvline(1, color="#111827", lw=1)
    axes.set_xscale("log")
    ends = [end for one in figures.comparisons for end in tenths(one.ratio.values)]
    ticks = [tick for tick in _TICKS if min(0.5, *ends) <= tick <= 2 * max(1.0, *ends)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0], 1.2 * ticks[-1])
    axes.set_yticks(range(len(figures.comparisons)), [one.name for one in figures.comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("times faster with offloading (red: what it should reach)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
