"""Shows what the demo measured: a table per request, totals, and a plot of the time to first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxkv.cli.workload import Turn
from jaxkv.connector import ConnectorStats


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """The same workload without and with offloading."""

    off: Sequence[Turn]
    on: Sequence[Turn]
    transfers: ConnectorStats
    device_evictions: int

    @property
    def tokens_equal(self) -> bool:
        """Whether every reply is the same, token for token."""
        return [turn.output_ids for turn in self.off] == [turn.output_ids for turn in self.on]

    @property
    def returning(self) -> list[tuple[Turn, Turn]]:
        """(off, on) of the requests that were served from the host pool."""
        return [
            (off, on) for off, on in zip(self.off, self.on, strict=True) if on.metrics.host_hit_tokens > 0
        ]

    @property
    def median_speedup(self) -> float:
        """How many times shorter the time to first token of those requests was."""
        return median(ttft_s(off) / ttft_s(on) for off, on in self.returning)


def ttft_s(turn: Turn) -> float:
    """Seconds to the first token of a finished turn."""
    assert turn.metrics.ttft_s is not None, f"{turn.name} finished without a token"
    return turn.metrics.ttft_s


def print_report(console: Console, comparison: Comparison) -> None:
    """The table of requests and the totals."""
    console.print(_request_table(comparison))
    stats, device_evictions = comparison.transfers, comparison.device_evictions
    console.print(
        f"stored {_moved(stats.stored_bytes, stats.store_seconds)}, "
        f"loaded {_moved(stats.loaded_bytes, stats.load_seconds)}\n"
        f"evicted {device_evictions} device blocks, {stats.evicted_chunks} host chunks"
    )
    if comparison.returning:
        off = median(ttft_s(turn) for turn, _ in comparison.returning) * 1e3
        on = median(ttft_s(turn) for _, turn in comparison.returning) * 1e3
        console.print(
            f"{len(comparison.returning)} requests came back from the host. Median time to first token:\n"
            f"{off:.0f} ms recomputed, {on:.0f} ms restored, [bold]{comparison.median_speedup:.1f} times[/] "
            "shorter"
        )
    equal = "yes" if comparison.tokens_equal else "NO"
    console.print(f"tokens equal with offloading on and off: [bold]{equal}[/]")


def _request_table(comparison: Comparison) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="prompt tokens by origin; time to first token on and off, in ms",
    )
    table.add_column("request", no_wrap=True)
    for name in ("prompt", "device", "host", "computed", "on", "off", "off/on"):
        table.add_column(name, justify="right", no_wrap=True)
    for off, on in zip(comparison.off, comparison.on, strict=True):
        metrics, ratio = on.metrics, f"{ttft_s(off) / ttft_s(on):.1f}"
        table.add_row(
            on.name,
            str(metrics.prompt_tokens),
            str(metrics.device_hit_tokens),
            str(metrics.host_hit_tokens),
            str(metrics.computed_tokens),
            f"{ttft_s(on) * 1e3:.0f}",
            f"{ttft_s(off) * 1e3:.0f}",
            f"[bold]{ratio}[/]" if metrics.host_hit_tokens else ratio,
        )
    return table


def _moved(num_bytes: int, elapsed_s: float) -> str:
    rate = f" at {num_bytes / elapsed_s / 1e9:.1f} GB/s" if elapsed_s > 0 else ""
    return f"{num_bytes / 2**20:.0f} MiB{rate}"


def save_plot(path: Path, comparison: Comparison) -> None:
    """A PNG with two bars per request: time to first token with offloading off and on."""
    from matplotlib.figure import Figure  # noqa: PLC0415 -- heavy, and only the demo plots

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(comparison.on))
    axes.barh(
        [row - 0.2 for row in rows], [ttft_s(t) for t in comparison.off], 0.4, label="off", color="#b0b7c3"
    )
    axes.barh(
        [row + 0.2 for row in rows], [ttft_s(t) for t in comparison.on], 0.4, label="on", color="#2563eb"
    )
    axes.set_yticks(list(rows), [turn.name for turn in comparison.on])
    axes.invert_yaxis()
    axes.set_xlabel("time to first token, seconds")
    axes.set_title("Conversations that outgrow the device cache")
    axes.legend(title="offloading")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
