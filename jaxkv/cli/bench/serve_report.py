"""The table of ``jaxkv bench serve``."""

from __future__ import annotations

from rich.console import Console

from jaxkv.cli.bench.series import tenths
from jaxkv.cli.bench.serve_command import ServeFigures
from jaxkv.cli.bench.show import judged, make_table


def print_serve(figures: ServeFigures, console: Console | None = None) -> None:
    """Milliseconds with offloading off and on, and how many times faster on was."""
    console = console or Console()
    columns = ("off", "on", "off/on", "10%", "90%", "at least")
    table = make_table("milliseconds with offloading off and on; off/on by rounds", "", columns)
    for one in figures.comparisons:
        low, high = tenths(one.ratio.values)
        ratio = _digits(one.ratio.median)
        table.add_row(
            one.name,
            _digits(one.off.median_s * 1e3),
            _digits(one.on.median_s * 1e3),
            ratio if one.at_least is None else judged(ratio, met=one.ratio.met),
            _digits(low),
            _digits(high),
            "" if one.at_least is None else f"{one.at_least:g}",
        )
    console.print(table)


def _digits(number: float) -> str:
    return f"{number:.3f}" if number < 10 else f"{number:.1f}"
