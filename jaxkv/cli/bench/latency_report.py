"""The table of ``jaxkv bench latency``."""

from __future__ import annotations

from rich.console import Console

from jaxkv.cli.bench.copy_measure import size_name
from jaxkv.cli.bench.latency_measure import LatencyFigures, LatencyResult
from jaxkv.cli.bench.show import add_times, make_table


def print_latency(figures: LatencyFigures, console: Console | None = None) -> None:
    """Microseconds of every way to move a block."""
    console = console or Console()
    table = make_table(
        f"microseconds; one block of {size_name(figures.settings.page_bytes)} a leaf",
        "",
        ("median", "10%", "90%", "at most"),
    )
    for result in figures.results:
        table.add_row(title_of(result), style="bold")
        for measurement in result.measurements:
            add_times(table, measurement, unit=1e-6, indent="  ")
    console.print(table)


def title_of(result: LatencyResult) -> str:
    """What is moved."""
    return f"{result.direction}, {result.num_leaves} {'leaf' if result.num_leaves == 1 else 'leaves'}"
