"""Shows what was measured: tables of medians with their spread, and the machine they hold for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxkv.cli.bench_scheduler import BATCH_KEYS, CrowdFigures, Figures, Measurement
from jaxkv.cli.environment import describe_environment
from jaxkv.cli.replay_report import gib, retention_name
from jaxkv.replay.retention import Families, RetentionResult


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says on standard error what is going on."""
    with Console(stderr=True).status("starting") as status:
        yield status.update


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
    console.print(", ".join(f"{name} {fact}" for name, fact in describe_environment().items()))


def print_retention(
    model: str, host_bytes: int, families: Families, results: Sequence[RetentionResult]
) -> None:
    """The table of ``jaxkv bench retention``."""
    console = Console()
    console.print(
        f"[bold]{model}[/]: {families.num_families} x {families.branches} prompts of "
        f"{families.prompt_tokens:,} tokens, {families.shared_tokens:,} shared; host {gib(host_bytes)} GiB"
    )
    table = _table("what the pool alone could serve in the end")
    for name in ("keep", "stored GiB", "prompts", "families", "branch points", "times"):
        table.add_column(name, justify="left" if name == "keep" else "right", no_wrap=True)
    dense = next((one.servable_prompts for one in results if one.retention_interval is None), 0)
    for result in results:
        table.add_row(
            retention_name(result.retention_interval),
            gib(result.stored_bytes),
            f"[bold]{result.servable_prompts}[/]/{result.num_prompts}",
            str(result.servable_families),
            str(result.branch_points),
            f"{result.servable_prompts / dense:.1f}" if dense else "",
        )
    console.print(table)


def _largest_table(figures: Figures) -> Table:
    table = _table("milliseconds of the scheduler's thread")
    table.add_column("", no_wrap=True)
    for name in ("median", "10%", "90%", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    largest = figures.crowds[0]
    steps = (largest.step, largest.quiet_step, largest.empty_step)
    for measurement in (*steps, largest.device_admission, largest.admission):
        _add_times(table, measurement)
    for measurement in largest.admission_parts:
        _add_times(table, measurement, indent="  ")
    for measurement in (*figures.lookups, *figures.hashing):
        _add_times(table, measurement)
    return table


def _add_times(table: Table, measurement: Measurement, indent: str = "") -> None:
    low, high = measurement.spread_s
    target = "" if measurement.target_s is None else f"{measurement.target_s * 1e3:g}"
    style = "bold" if measurement.met else "bold red"
    median = f"{measurement.median_s * 1e3:.3f}"
    table.add_row(
        indent + measurement.name,
        median if measurement.target_s is None else f"[{style}]{median}[/]",
        f"{low * 1e3:.3f}",
        f"{high * 1e3:.3f}",
        target,
    )


def _growth_table(crowds: Sequence[CrowdFigures]) -> Table:
    table = _table("medians in ms at other sizes")
    for name in ("chunks", "context", "step", "quiet step", "all on the host"):
        table.add_column(name, justify="right", no_wrap=True)
    for crowd in sorted(crowds, key=lambda crowd: (crowd.context_tokens, crowd.num_chunks)):
        times = (crowd.step, crowd.quiet_step, crowd.admission)
        table.add_row(
            f"{crowd.num_chunks:,}",
            f"{crowd.context_tokens:,}",
            *(f"{one.median_s * 1e3:.3f}" for one in times),
        )
    return table


def _key_table(figures: Figures) -> Table:
    table = _table(f"microseconds per key in batches of {BATCH_KEYS}")
    table.add_column("", no_wrap=True)
    for number, _ in figures.keys:
        for name in (f"{number:,} chunks", "10%", "90%"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*(measured for _, measured in figures.keys), strict=True):
        times = [(one.median_s, *one.spread_s) for one in row]
        table.add_row(row[0].name, *(f"{1e6 * seconds:.2f}" for cell in times for seconds in cell))
    return table


def _table(caption: str) -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
