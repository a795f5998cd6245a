"""Draws ``jaxkv bench copy``: rate against page size, one line for each way to copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxkv.cli.bench.copy_contenders import COPYING, JAXKV, ROOF
from jaxkv.cli.bench.copy_measure import CopyFigures, CopyResult
from jaxkv.cli.bench.copy_report import page_name, tables_of, title_of
from jaxkv.cli.bench.series import tenths

_COLOURS = ("#d97706", "#7c3aed", "#0d9488", "#be123c", "#4d7c0f", "#0369a1", "#a16207", "#6b7280")


def save_copy_plot(path: Path, figures: CopyFigures) -> None:
    """A PNG with a panel for every table."""
    tables = tables_of(figures)
    rows = -(-len(tables) // 2)
    figure = Figure(figsize=(13, 4.8 * rows), layout="constrained")
    for place, results in enumerate(tables, start=1):
        _draw(figure.add_subplot(rows, 2, place), results)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, results: Sequence[CopyResult]) -> None:
    colours = iter(_COLOURS)
    names = list(results[0].seconds)
    for name in names:
        style: dict[str, Any] = {"lw": 1.5, "ms": 4, "marker": "o"}
        if name == JAXKV:
            style |= {"color": "#2563eb", "lw": 3, "ms": 6, "zorder": 3}
        elif name == ROOF:
            style |= {"color": "#111827", "ls": "--", "marker": "_"}
        elif name == COPYING:
            style |= {"color": "#2563eb", "ls": ":", "marker": "_"}
        else:
            style["color"] = next(colours)
        _draw_line(axes, results, name, style)
    axes.set_xticks(range(len(results)), [page_name(result) for result in results])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("page")
    axes.set_ylabel("GB/s")
    axes.set_title(title_of(results[0]))
    axes.grid(visible=True, axis="y", color="#e5e7eb")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(axes: Any, results: Sequence[CopyResult], name: str, style: dict[str, Any]) -> None:
    rates = [result.gb_per_s(name) for result in results]
    axes.plot(range(len(results)), rates, label=name, **style)
    low, high = [], []
    for result in results:
        fast, slow = tenths(result.seconds[name])
        low.append(result.shape.num_bytes / slow / 1e9)
        high.append(result.shape.num_bytes / fast / 1e9)
    axes.fill_between(range(len(results)), low, high, color=style["color"], alpha=0.12, lw=0)
