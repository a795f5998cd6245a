"""The subcommands of ``jaxkv bench``."""

from __future__ import annotations

from typing import Any

from jaxkv.cli.bench.all_command import add_all
from jaxkv.cli.bench.base import Bench, add_bench
from jaxkv.cli.bench.copy_command import CopyBench
from jaxkv.cli.bench.cuda_command import CudaBench
from jaxkv.cli.bench.latency_command import LatencyBench
from jaxkv.cli.bench.memory_command import MemoryBench
from jaxkv.cli.bench.retention_command import RetentionBench
from jaxkv.cli.bench.scheduler_command import SchedulerBench
from jaxkv.cli.bench.serve_command import ServeBench

BENCHES: tuple[Bench, ...] = (
    CopyBench(),
    LatencyBench(),
    ServeBench(),
    MemoryBench(),
    SchedulerBench(),
    RetentionBench(),
    CudaBench(),
)


def add_parser(commands: Any) -> None:
    """Add ``bench`` and its own subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure copies, latency, memory, serving and decisions",
        description="Measure jaxkv on this machine, beside what one would do without it.",
    )
    benches = parser.add_subparsers(required=True, metavar="WHAT")
    for bench in BENCHES:
        add_bench(benches, bench)
    add_all(benches, BENCHES)
