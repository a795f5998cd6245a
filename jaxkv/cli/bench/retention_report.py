"""The table of ``jaxkv bench retention``."""

from __future__ import annotations

from rich.console import Console

from jaxkv.cli.bench.retention_command import RetentionFigures
from jaxkv.cli.bench.show import make_table
from jaxkv.cli.replay_report import gib, retention_name


def print_retention(figures: RetentionFigures) -> None:
    """The table of ``jaxkv bench retention``."""
    console = Console()
    families, results = figures.families, figures.results
    console.print(
        f"[bold]{figures.model}[/]: {families.num_families} x {families.branches} prompts of "
        f"{families.prompt_tokens:,} tokens, {families.shared_tokens:,} shared; "
        f"host {gib(figures.host_bytes)} GiB"
    )
    columns = ("stored GiB", "prompts", "families", "branch points", "times")
    table = make_table("what the pool alone could serve in the end", "keep", columns)
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
