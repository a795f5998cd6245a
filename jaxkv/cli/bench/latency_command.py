"""``jaxkv bench latency``: how long one block takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from jaxkv.cli.arguments import count, size
from jaxkv.cli.bench.base import Bench, Verdict
from jaxkv.cli.bench.copy_command import page_size
from jaxkv.cli.bench.latency_measure import LatencyFigures, LatencySettings, measure_latency
from jaxkv.cli.bench.latency_report import title_of
from jaxkv.cli.bench.series import Tell

_EPILOG = """\
  the op in a program          the op alone in a jitted program, as BlockTransfer calls it: one array on the
                               device says which block, which address and which pool
  BlockTransfer, waited for    offload(...).wait() and restore(...): ids and slots are checked, slots pinned,
                               a program called, its status read
  a program that does nothing  the same arguments and results without the op: what JAX takes to call a
                               program with so many arrays, which no op can be faster than
Every call moves another block, of leaves that the processor's cache does not hold. Calls come in bursts of
20, the ways by turns. "At most" is what the op should take; red misses it.
"""


@final
class LatencyBench(Bench):
    """Moves one block at a time."""

    name = "latency"
    summary = "how long one block takes: the op alone, and the whole call"
    description = "Time moving one block, by the number of leaves."
    epilog = _EPILOG
    short = ("--repeats", "10")

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        usual = LatencySettings()
        parser.add_argument(
            "--leaves", type=count, nargs="+", default=list(usual.num_leaves), metavar="N",
            help="numbers of leaves (default 1 8 60)",
        )  # fmt: skip
        parser.add_argument(
            "--page",
            type=page_size,
            default=usual.page_bytes,
            help="bytes of a block in a leaf (default 4KiB)",
        )
        parser.add_argument(
            "--cache-bytes", type=size, default=usual.cache_bytes, help="all leaves together (default 64MiB)"
        )
        parser.add_argument("--repeats", type=count, default=usual.repeats, help="bursts (default 25)")

    def measure(self, args: argparse.Namespace, tell: Tell) -> LatencyFigures:
        """See ``Bench``."""
        settings = LatencySettings(tuple(args.leaves), args.page, args.cache_bytes, args.repeats)
        return measure_latency(settings, tell)

    def as_json(self, figures: LatencyFigures) -> dict[str, Any]:
        """See ``Bench``. Times in seconds."""
        results = [
            {
                "direction": result.direction,
                "leaves": result.num_leaves,
                "measurements": [one.as_json() for one in result.measurements],
            }
            for result in figures.results
        ]
        return {"page_bytes": figures.settings.page_bytes, "results": results}

    def load_report(self) -> Callable[[LatencyFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.latency_report import print_latency  # noqa: PLC0415

        return print_latency

    def load_plot(self) -> Callable[[Path, LatencyFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.latency_plot import save_latency_plot  # noqa: PLC0415

        return save_latency_plot

    def missed(self, figures: LatencyFigures) -> Verdict:
        """See ``Bench``."""
        return [
            f"{title_of(result)}: {one.median_s * 1e6:.1f} us, at most {(one.target_s or 0) * 1e6:g}"
            for result in figures.results
            for one in result.measurements
            if not one.met
        ]
