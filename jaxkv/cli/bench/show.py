"""What tables of all benchmarks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxkv.cli.bench.series import Measurement, Ratio
from jaxkv.cli.environment import describe_environment


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says on standard error what is going on."""
    with Console(stderr=True).status("starting") as status:
        yield status.update


def print_environment(console: Console | None = None) -> None:
    """The machine and the versions that figures hold for."""
    console = console or Console()
    console.print(", ".join(f"{name} {fact}" for name, fact in describe_environment().items()))


def make_table(caption: str, first: str, columns: Sequence[str]) -> Table:
    """A table whose first column names rows and whose others hold numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption or None)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def judged(text: str, *, met: bool) -> str:
    """A figure with a target: bold, and red where it is missed."""
    return f"[{'bold' if met else 'bold red'}]{text}[/]"


def add_ratios(table: Table, name: str, ratios: Sequence[Ratio | None]) -> None:
    """A row of ratios, and below it what they should be at least, if anything."""
    table.add_row(escape(name), *(_ratio_cell(ratio) for ratio in ratios))
    targets = ["" if one is None or one.at_least is None else f"{one.at_least:g}" for one in ratios]
    if any(targets):
        table.add_row("  at least", *targets, style="dim")


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio.median:.{2 if ratio.median < 10 else 1}f}"
    return text if ratio.at_least is None else judged(text, met=ratio.met)


def add_times(table: Table, measurement: Measurement, unit: float = 1e-3, indent: str = "") -> None:
    """A row of median, 10%, 90% and target in units of ``unit`` seconds, by default milliseconds."""
    low, high = measurement.spread_s
    digits = 3 if unit > 1e-6 else 1
    median = f"{measurement.median_s / unit:.{digits}f}"
    has_target = measurement.target_s is not None
    table.add_row(
        indent + measurement.name,
        judged(median, met=measurement.met) if has_target else median,
        f"{low / unit:.{digits}f}",
        f"{high / unit:.{digits}f}",
        "" if measurement.target_s is None else f"{measurement.target_s / unit:g}",
    )
