"""``jaxkv bench scheduler``: what the connector's decisions cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, final

from jaxkv.cli.arguments import count
from jaxkv.cli.bench.base import Bench, Verdict
from jaxkv.cli.bench.scheduler_measure import Figures, Sizes, measure_scheduler
from jaxkv.cli.bench.series import Tell

_EPILOG = """\
The scheduler side of the connector runs in the serving loop's thread: what it takes is added to every step.
Three groups (full attention, a window of 1,024 tokens, a recurrent state) share a pool that is full, so that
every store evicts. Requests run on contexts of which the pool holds each chunk in every group.

Measured are medians, and what a tenth of the calls stayed below and above:
  step       build_connector_meta and update_connector_output of a step of one token for every request. In the
             first row a sixteenth of them finishes a block, which is stored in all groups.
  comes      what a new request adds, its hashes known, until its first token is computed and what it found is
             offered to the host; in one row it finds its prompt on the device, in the other on the host.
  per key    calls of the host manager in batches of 64 keys, the end of the request included.
The second table shows that nothing grows with the pool, nor steps with the length of contexts; only what a
request finds grows with its prompt.
"""


@final
class SchedulerBench(Bench):
    """Times the scheduler side and the manager, without bytes."""

    name = "scheduler"
    summary = "the connector's scheduler side and the host manager, without bytes"
    description = "Time the connector's scheduler side and the host manager, without moving bytes."
    epilog = _EPILOG
    short = ("--chunks", "200000", "--fewer-chunks", "50000", "--repeats", "20")

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        sizes = Sizes()
        for option, number, text in (
            ("--chunks", sizes.num_chunks, "chunks in the pool"),
            ("--context-tokens", sizes.context_tokens, "tokens of a context, a multiple of 16"),
            ("--running", sizes.num_running, "running requests"),
            ("--repeats", sizes.repeats, "timings of each kind"),
            ("--fewer-chunks", sizes.fewer_chunks, "a smaller pool to compare with"),
            ("--shorter-context-tokens", sizes.shorter_context_tokens, "shorter contexts to compare with"),
        ):
            parser.add_argument(option, type=count, default=number, help=f"{text} (default {number:,})")
        parser.add_argument(
            "--index-chunks",
            type=count,
            nargs="+",
            default=list(sizes.index_chunks),
            metavar="CHUNKS",
            help="chunks in the pools that single keys are timed on (default 10,000 and 200,000)",
        )

    def measure(self, args: argparse.Namespace, tell: Tell) -> Figures:
        """See ``Bench``."""
        sizes = Sizes(
            num_chunks=args.chunks,
            context_tokens=args.context_tokens,
            num_running=args.running,
            repeats=args.repeats,
            index_chunks=tuple(args.index_chunks),
            fewer_chunks=args.fewer_chunks,
            shorter_context_tokens=args.shorter_context_tokens,
        )
        return measure_scheduler(sizes, tell)

    def as_json(self, figures: Figures) -> dict[str, Any]:
        """See ``Bench``. Times in seconds."""
        return {
            "crowds": [
                {
                    "chunks": crowd.num_chunks,
                    "context_tokens": crowd.context_tokens,
                    "measurements": [
                        one.as_json()
                        for one in (
                            crowd.step,
                            crowd.quiet_step,
                            crowd.empty_step,
                            crowd.device_admission,
                            crowd.admission,
                            *crowd.admission_parts,
                        )
                    ],
                }
                for crowd in figures.crowds
            ],
            "lookups": [one.as_json() for one in figures.lookups],
            "hashing": [one.as_json() for one in figures.hashing],
            "keys": [
                {"chunks": number, "measurements": [one.as_json() for one in measured]}
                for number, measured in figures.keys
            ],
        }

    def load_report(self) -> Callable[[Figures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.scheduler_report import print_scheduler  # noqa: PLC0415

        return print_scheduler

    def missed(self, figures: Figures) -> Verdict:
        """See ``Bench``."""
        return [
            f"{one.name}: {one.median_s * 1e3:.3f} ms, at most {(one.target_s or 0) * 1e3:g}"
            for one in figures.missed
        ]
