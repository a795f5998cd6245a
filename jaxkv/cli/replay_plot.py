"""Draws hit rate against pool size, with the offline optimum and what bounds both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxkv.replay.run import ReplayResult

_COLOURS = ("#2563eb", "#d97706", "#7c3aed", "#0d9488", "#be123c", "#4d7c0f")


def save_plot(path: Path, results: Sequence[ReplayResult]) -> None:
    """A PNG with one line per policy and retention. Results of one line stand next to each other."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    lines = [list(line) for _, line in groupby(results, key=_line_name)]
    for colour, line in zip(_colours(len(lines)), lines, strict=True):
        _draw(axes, line, [run.hit_rate for run in line], label=_line_name(line[0]), color=colour)
    best = [max(runs, key=lambda run: run.optimal_hit_rate) for runs in zip(*lines, strict=True)]
    rates = [run.optimal_hit_rate for run in best]
    _draw(axes, best, rates, label="offline optimum", color="#111827", ls="--")
    limit = max(run.highest_hit_rate for run in results)
    axes.axhline(100 * limit, color="#9ca3af", lw=1, label="seen before at all")
    _finish(axes, results[0])
    figure.savefig(path, dpi=120)


def _draw(axes: Any, runs: Sequence[ReplayResult], rates: Sequence[float], **style: Any) -> None:
    sizes = [run.deployment.host_bytes / 2**30 for run in runs]
    axes.plot(sizes, [100 * rate for rate in rates], marker="o", ms=4, lw=2, **style)


def _line_name(result: ReplayResult) -> str:
    interval = result.deployment.retention_interval
    kept = "every block" if interval is None else f"retention {interval}"
    return f"{result.deployment.eviction_policy}, {kept}"


def _colours(number: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(number)]


def _finish(axes: Any, result: ReplayResult) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.set_ylim(0, 100)
    axes.set_xlabel("host pool, GiB")
    axes.set_ylabel("prompt tokens not computed, percent")
    device = result.deployment.device_bytes / 2**30
    axes.set_title(f"{result.deployment.model}, {result.num_requests} requests, device cache {device:g} GiB")
    axes.grid(visible=True, color="#e5e7eb")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
