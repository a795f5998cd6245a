"""``jaxkv bench``: what the connector's decisions cost, and what retention is worth."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from jaxkv.cli.arguments import count, retention, size
from jaxkv.cli.bench_scheduler import Figures, Measurement, Sizes, measure_scheduler
from jaxkv.cli.environment import describe_environment
from jaxkv.cli.extras import needs_extra
from jaxkv.replay.models import find_model_shape
from jaxkv.replay.retention import Families, serve_families

_SCHEDULER_EPILOG = """\
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

_RETENTION_EPILOG = """\
Prompts are served one after another, more than the pool holds; all prompts of a family begin with the same
tokens. Then the pool alone is asked how much of each it could serve.
  prompts        those it could serve up to their last block
  families       of how many families
  branch points  families whose shared tokens it could serve to a prompt that goes on in a new way
  times          prompts, compared with storing every block of every layer
"""


def add_parser(commands: Any) -> None:
    """Add ``bench`` and its own subcommands."""
    parser = commands.add_parser(
        "bench", help="measure what decisions cost", description="Measure jaxkv on this machine."
    )
    benches = parser.add_subparsers(required=True, metavar="WHAT")
    _add_scheduler(benches)
    _add_retention(benches)


def _add_scheduler(benches: Any) -> None:
    parser = benches.add_parser(
        "scheduler",
        help="the connector's scheduler side and the host manager, without bytes",
        description="Time the connector's scheduler side and the host manager, without moving bytes.",
        epilog=_SCHEDULER_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a median misses its target")
    parser.set_defaults(run=run_scheduler)


def _add_retention(benches: Any) -> None:
    parser = benches.add_parser(
        "retention",
        help="how many prompts a pool can serve, by what windows and states keep",
        description="Count the distinct prompts that a host pool of one size can serve.",
        epilog=_RETENTION_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="gemma-like", help="as for jaxkv replay (default gemma-like)")
    parser.add_argument("--host-bytes", type=size, default="64GiB", help="host pool (default 64GiB)")
    parser.add_argument(
        "--retention", type=retention, nargs="+", default=[None, 0], metavar="N", help="(default dense 0)"
    )
    for option, number, text in (
        ("--prompt-tokens", 32_768, "tokens of a prompt"),
        ("--shared-tokens", 24_576, "tokens that a family shares"),
        ("--branches", 8, "prompts of a family"),
        ("--families", 16, "families"),
        ("--output-tokens", 16, "tokens of a reply"),
    ):
        parser.add_argument(option, type=count, default=number, help=f"{text} (default {number:,})")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run_retention)


def run_retention(args: argparse.Namespace) -> int:
    """Count with every retention interval."""
    families = Families(
        args.families, args.branches, args.prompt_tokens, args.shared_tokens, args.output_tokens
    )
    groups = find_model_shape(args.model).make_groups(16)
    results = [serve_families(groups, families, args.host_bytes, interval) for interval in args.retention]
    if args.json:
        runs = [asdict(result) for result in results]
        print(json.dumps({"environment": describe_environment(), "runs": runs}, indent=2))
    else:
        with needs_extra("bench", "the table of a benchmark"):
            from jaxkv.cli import bench_report  # noqa: PLC0415
        bench_report.print_retention(args.model, args.host_bytes, families, results)
    return 0


def run_scheduler(args: argparse.Namespace) -> int:
    """Measure, show, and judge if asked to."""
    sizes = Sizes(
        num_chunks=args.chunks,
        context_tokens=args.context_tokens,
        num_running=args.running,
        repeats=args.repeats,
        index_chunks=tuple(args.index_chunks),
        fewer_chunks=args.fewer_chunks,
        shorter_context_tokens=args.shorter_context_tokens,
    )
    if args.json:
        figures = measure_scheduler(sizes, lambda line: print(line, file=sys.stderr))
        print(json.dumps(as_json(figures), indent=2))
    else:
        with needs_extra("bench", "the table of a benchmark"):
            from jaxkv.cli import bench_report  # noqa: PLC0415
        with bench_report.progress() as tell:
            figures = measure_scheduler(sizes, tell)
        bench_report.print_scheduler(figures)
    return 0 if figures.all_met or not args.check else 1


def as_json(figures: Figures) -> dict[str, Any]:
    """All figures as plain values; times in seconds."""
    return {
        "environment": describe_environment(),
        "crowds": [
            {
                "chunks": crowd.num_chunks,
                "context_tokens": crowd.context_tokens,
                "measurements": [
                    _as_json(one)
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
        "lookups": [_as_json(one) for one in figures.lookups],
        "hashing": [_as_json(one) for one in figures.hashing],
        "keys": [
            {"chunks": number, "measurements": [_as_json(one) for one in measured]}
            for number, measured in figures.keys
        ],
    }


def _as_json(measurement: Measurement) -> dict[str, Any]:
    low, high = measurement.spread_s
    return {
        "name": measurement.name,
        "median_s": measurement.median_s,
        "tenth_s": low,
        "nine_tenths_s": high,
        "count": len(measurement.seconds),
        "target_s": measurement.target_s,
    }
