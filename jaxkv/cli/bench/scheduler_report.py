"""Tables of ``jaxkv bench scheduler``: medians with their spread."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jaxkv.cli.bench.scheduler_measure import BATCH_KEYS, CrowdFigures, Figures
from jaxkv.cli.bench.show import add_times, make_table


def print_scheduler(figures: Figures, console: Console | None = None) -> None:
    """All tables of ``jaxkv bench scheduler``."""
    console = console or Console()
    largest, sizes = figures.crowds[0], figures.sizes
    console.print(
        f"{sizes.num_running} running requests of {largest.context_tokens:,} tokens, 3 groups, "
        f"{largest.num_chunks:,} resident chunks"
    )
    console.print(_largest_table(figures))
    console.print(_growth_table(figures.crowds))
    console.print(_key_table(figures))


def _largest_table(figures: Figures) -> Table:
    table = make_table("milliseconds of the scheduler's thread", "", ("median", "10%", "90%", "target"))
    largest = figures.crowds[0]
    steps = (largest.step, largest.quiet_step, largest.empty_step)
    for measurement in (*steps, largest.device_admission, largest.admission):
        add_times(table, measurement)
    for measurement in largest.admission_parts:
        add_times(table, measurement, indent="  ")
    for measurement in (*figures.lookups, *figures.hashing):
        add_times(table, measurement)
    return table


def _growth_table(crowds: Sequence[CrowdFigures]) -> Table:
    columns = ("context", "step", "quiet step", "all on the host")
    table = make_table("medians in ms at other sizes", "chunks", columns)
    for crowd in sorted(crowds, key=lambda crowd: (crowd.context_tokens, crowd.num_chunks)):
        times = (crowd.step, crowd.quiet_step, crowd.admission)
        table.add_row(
            f"{crowd.num_chunks:,}",
            f"{crowd.context_tokens:,}",
            *(f"{one.median_s * 1e3:.3f}" for one in times),
        )
    return table


def _key_table(figures: Figures) -> Table:
    columns = [name for number, _ in figures.keys for name in (f"{number:,} chunks", "10%", "90%")]
    table = make_table(f"microseconds per key in batches of {BATCH_KEYS}", "", columns)
    for row in zip(*(measured for _, measured in figures.keys), strict=True):
        times = [(one.median_s, *one.spread_s) for one in row]
        table.add_row(row[0].name, *(f"{1e6 * seconds:.2f}" for cell in times for seconds in cell))
    return table
