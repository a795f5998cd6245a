"""Draws ``jaxkv bench latency``: bars of medians with their spread."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from jaxkv.cli.bench.latency_measure import CALL, NOTHING, OP, LatencyFigures
from jaxkv.cli.bench.latency_report import title_of

_COLOURS = {OP: "#2563eb", CALL: "#93c5fd", NOTHING: "#b0b7c3"}


def save_latency_plot(path: Path, figures: LatencyFigures) -> None:
    """A PNG with three bars for every direction and number of leaves."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(figures.results))
    for number, name in enumerate((OP, CALL, NOTHING)):
        measured = [result.measurements[number] for result in figures.results]
        medians = [one.median_s * 1e6 for one in measured]
        below = [(one.median_s - one.spread_s[0]) * 1e6 for one in measured]
        above = [(one.spread_s[1] - one.median_s) * 1e6 for one in measured]
        bars = [place + 0.27 * (number - 1) for place in places]
        axes.bar(bars, medians, 0.25, yerr=(below, above), label=name, color=_COLOURS[name], ecolor="#4b5563")
        targets = [(bar, one.target_s * 1e6) for bar, one in zip(bars, measured, strict=True) if one.target_s]
        if targets:
            starts, heights = [bar - 0.15 for bar, _ in targets], [height for _, height in targets]
            ends = [bar + 0.15 for bar, _ in targets]
            axes.hlines(heights, starts, ends, color="#be123c", lw=2, label="at most")
    axes.set_xticks(list(places), [title_of(result).replace(", ", "\n") for result in figures.results])
    axes.set_ylabel("microseconds")
    axes.set_title("Moving one block")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
