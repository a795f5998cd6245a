"""Tables of ``jaxkv bench copy``: rates, and how many times faster than each other way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxkv.cli.bench.copy_caches import SMALLEST_PAGE
from jaxkv.cli.bench.copy_contenders import COPYING, JAXKV
from jaxkv.cli.bench.copy_measure import CopyFigures, CopyResult, size_name
from jaxkv.cli.bench.series import Ratio
from jaxkv.cli.bench.show import add_ratios, make_table


def print_copy(figures: CopyFigures, console: Console | None = None) -> None:
    """Two tables for every number of threads and leaves and each direction."""
    console = console or Console()
    console.print(
        f"{figures.settings.moved_bytes / 2**20:.0f} MiB moved, blocks in random order, medians of "
        f"{figures.settings.repeats} rounds"
    )
    strided = {id(result): ratio for result, ratio in figures.strided_ratios}
    for results in tables_of(figures):
        console.print(_rates(results))
        console.print(_ratios(results, [strided.get(id(result)) for result in results]))


def tables_of(figures: CopyFigures) -> list[list[CopyResult]]:
    """Results that differ in their pages only."""

    def kind(result: CopyResult) -> tuple[int, int, str]:
        return result.num_threads, result.shape.num_leaves, result.direction

    return [list(results) for _, results in groupby(sorted(figures.results, key=kind), key=kind)]


def page_name(result: CopyResult) -> str:
    """What a column is called."""
    shape = result.shape
    return f"{size_name(shape.run_bytes)} runs" if shape.is_strided else size_name(shape.page_bytes)


def title_of(result: CopyResult) -> str:
    """What results that differ in their pages have in common."""
    leaves, threads = result.shape.num_leaves, result.num_threads
    return (
        f"{result.direction}, {leaves} {'leaf' if leaves == 1 else 'leaves'}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}"
    )


def _rates(results: Sequence[CopyResult]) -> Table:
    columns = [page_name(result) for result in results]
    table = make_table("GB/s by page size", title_of(results[0]), columns)
    names = [name for name in results[0].seconds if name not in (JAXKV, COPYING)]
    for name in (JAXKV, COPYING, *names):
        style = "bold" if name == JAXKV else None
        table.add_row(escape(name), *(f"{result.gb_per_s(name):.1f}" for result in results), style=style)
    return table


def _ratios(results: Sequence[CopyResult], strided: Sequence[Ratio | None]) -> Table:
    table = make_table("", "how many times faster than", [page_name(result) for result in results])
    for name in results[0].seconds:
        if name not in (JAXKV, COPYING):
            add_ratios(table, name, [result.ratio(name) for result in results])
    if any(strided):
        add_ratios(table, f"whole pages of {size_name(SMALLEST_PAGE)}", strided)
    return table
