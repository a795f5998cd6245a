"""Tables of ``jaxkv bench memory``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jaxkv.cli.bench.memory_measure import GIB, MemoryFigures
from jaxkv.cli.bench.show import judged, make_table
from jaxkv.cli.replay_report import gib


def print_memory(figures: MemoryFigures, console: Console | None = None) -> None:
    """Pools, then transfers."""
    console = console or Console()
    console.print(_pools(figures))
    for num_bytes in figures.too_large:
        console.print(f"no room here for a pool of {gib(num_bytes)} GiB")
    console.print(_peaks(figures))


def _pools(figures: MemoryFigures) -> Table:
    columns = ("cold", "warm", "10%", "90%", "at most", "np.ones", "huge pages", "MiB beside")
    table = make_table("seconds to allocate and populate a pool", "GiB", columns)
    for pool in figures.pools:
        low, high = pool.warm.spread_s
        target = pool.warm.target_s
        warm = f"{pool.warm.median_s:.3f}"
        table.add_row(
            gib(pool.num_bytes),
            f"{pool.cold_s:.3f}",
            warm if target is None else judged(warm, met=pool.warm.met),
            f"{low:.3f}",
            f"{high:.3f}",
            "" if target is None else f"{target:g}",
            f"{pool.numpy.median_s:.3f}",
            "yes" if pool.huge_pages else "no",
            mib(pool.extra_bytes),
        )
    return table


def _peaks(figures: MemoryFigures) -> Table:
    moved = figures.settings.moved_bytes / GIB * 1024
    table = make_table(f"memory that moving {moved:.0f} MiB takes", "", ("MiB beside caches and pool",))
    for peak in figures.peaks:
        table.add_row(peak.name, mib(peak.extra_bytes))
    return table


def mib(num_bytes: int | None) -> str:
    """MiB, or that nobody knows."""
    return "unknown" if num_bytes is None else f"{num_bytes / 2**20:.0f}"
