"""Shows replays: a progress bar while they run, then a table of hit rates and one of traffic by group."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxkv.replay.run import Deployment, ReplayResult, replay
from jaxkv.replay.trace import TraceRequest


def replay_all(trace: Sequence[TraceRequest], deployments: Sequence[Deployment]) -> list[ReplayResult]:
    """One replay after another, with a bar on standard error."""
    console = Console(stderr=True)
    runs = track(deployments, "replaying", console=console, transient=True)
    return [replay(trace, deployment) for deployment in runs]


def print_report(
    trace: Sequence[TraceRequest], results: Sequence[ReplayResult], console: Console | None = None
) -> None:
    """Print both tables."""
    console = console or Console()
    tokens = sum(request.prompt_tokens for request in trace)
    longest = max(request.prompt_tokens for request in trace)
    deployment = results[0].deployment
    console.print(
        f"[bold]{deployment.model}[/]: {len(trace)} requests, {tokens / 1e6:.1f}M prompt tokens, the longest "
        f"{longest:,}; device {gib(deployment.device_bytes)} GiB"
    )
    console.print(_hit_table(results))
    console.print(_traffic_table(results))


def gib(num_bytes: int) -> str:
    """GiB, with decimals where there are few."""
    size = num_bytes / 2**30
    return f"{size:.3g}" if size < 100 else f"{size:.0f}"


def retention_name(interval: int | None) -> str:
    """How tables call a retention interval."""
    return "dense" if interval is None else str(interval)


def _hit_table(results: Sequence[ReplayResult]) -> Table:
    table = _table("prompt tokens by origin in percent; see jaxkv replay --help for the columns")
    _add_columns(table, ("device", "host", "computed", "hit", "optimum", "limit", "servable"))
    for result in results:
        table.add_row(
            *_run_cells(result.deployment),
            _percent(result.device_tokens / result.prompt_tokens),
            _percent(result.host_tokens / result.prompt_tokens),
            _percent(result.computed_tokens / result.prompt_tokens),
            f"[bold]{_percent(result.hit_rate)}[/]",
            _percent(result.optimal_hit_rate),
            _percent(result.highest_hit_rate),
            f"{result.servable_prompts}/{result.distinct_prompts}",
        )
    return table


def _traffic_table(results: Sequence[ReplayResult]) -> Table:
    table = _table("GiB moved between device and host; chunks evicted from the host and resident at the end")
    _add_columns(table, ("layers", "stored", "loaded", "evicted", "resident"))
    for result in results:
        table.add_row(
            *_run_cells(result.deployment), "device cache", "", "", f"{result.device_evictions:,}", ""
        )
        for group in result.groups:
            table.add_row(
                "",
                "",
                "",
                group.kind,
                gib(group.stored_bytes),
                gib(group.loaded_bytes),
                f"{group.evicted_chunks:,}",
                f"{group.resident_chunks:,}",
            )
    return table


def _table(caption: str) -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)


def _add_columns(table: Table, names: Sequence[str]) -> None:
    for name in ("GiB", "policy", "keep", *names):
        is_text = name in {"policy", "keep", "layers"}
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)


def _run_cells(deployment: Deployment) -> tuple[str, str, str]:
    interval = retention_name(deployment.retention_interval)
    return gib(deployment.host_bytes), deployment.eviction_policy, interval


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
