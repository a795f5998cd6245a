"""Tables of ``jaxkv bench cuda``: rates, and shares of the link."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxkv.cli.bench.copy_contenders import JAXKV
from jaxkv.cli.bench.copy_measure import size_name
from jaxkv.cli.bench.cuda_measure import LINK, CudaFigures, CudaResult
from jaxkv.cli.bench.show import make_table


def print_cuda(figures: CudaFigures, console: Console | None = None) -> None:
    """A table of rates and one of shares for every number of leaves and each direction."""
    console = console or Console()
    console.print(
        f"{figures.device}: {figures.settings.moved_bytes / 2**20:.0f} MiB moved, blocks in random order, "
        f"medians of {figures.settings.repeats} rounds"
    )
    console.print(f"jaxkv goes: {figures.paths}", markup=False)
    for results in _tables_of(figures):
        console.print(_rates(results))
        console.print(_shares(results))


def _tables_of(figures: CudaFigures) -> list[list[CudaResult]]:
    """Results that differ in their pages only."""

    def kind(result: CudaResult) -> tuple[int, str]:
        return result.shape.num_leaves, result.direction

    return [list(results) for _, results in groupby(sorted(figures.results, key=kind), key=kind)]


def _rates(results: Sequence[CudaResult]) -> Table:
    table = _table("GB/s by page size", results)
    for name in results[0].seconds:
        _add(table, name, [f"{one.gb_per_s(name):.1f}" if name in one.seconds else "" for one in results])
        if name in results[0].on_device_s:
            _add(table, "  on the device", [f"{one.on_device_gb_per_s(name):.1f}" for one in results])
    return table


def _shares(results: Sequence[CudaResult]) -> Table:
    table = _table("share of the link", results)
    for name in results[0].seconds:
        if name != LINK:
            _add(table, name, [f"{one.of_link(name):.2f}" if name in one.seconds else "" for one in results])
    return table


def _table(caption: str, results: Sequence[CudaResult]) -> Table:
    leaves = results[0].shape.num_leaves
    first = f"{results[0].direction}, {leaves} {'leaf' if leaves == 1 else 'leaves'}"
    return make_table(caption, first, [_page_name(result) for result in results])


def _page_name(result: CudaResult) -> str:
    shape = result.shape
    return f"{size_name(shape.run_bytes)} runs" if shape.is_strided else size_name(shape.page_bytes)


def _add(table: Table, name: str, cells: Sequence[str]) -> None:
    table.add_row(escape(name), *cells, style="bold" if name == JAXKV else None)
