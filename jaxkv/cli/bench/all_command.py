"""``jaxkv bench all``: every benchmark, with tables on the screen, JSON and plots in a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxkv.cli.bench.base import Bench, document
from jaxkv.cli.extras import needs_extra

_EPILOG = """\
Without --full each is cut short, so that all of them together take less than three minutes on two cores; a
figure that surprises is worth a run of its benchmark alone.
"""


def add_all(commands: Any, benches: Sequence[Bench]) -> None:
    """Add the subcommand that runs all of ``benches``."""
    parser = commands.add_parser(
        "all",
        help="all of them, cut short",
        description="Run every benchmark; print tables, write JSON and plots.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench-out"), metavar="DIR", help="where (default bench-out)"
    )
    parser.add_argument("--full", action="store_true", help="as long as each takes by itself")
    parser.add_argument("--no-model", action="store_true", help="leave out Gemma 3 270M")
    parser.set_defaults(run=lambda args: _run(args, benches))


def _run(args: argparse.Namespace, benches: Sequence[Bench]) -> int:
    with needs_extra("bench", "the benchmarks"):
        from jaxkv.cli.bench.show import print_environment  # noqa: PLC0415

        shown = [(bench, bench.load_report(), bench.load_plot()) for bench in benches if bench.runs_here()]
    args.output.mkdir(parents=True, exist_ok=True)
    written = []
    for bench, report, plot in shown:
        figures = _measure(bench, args)
        report(figures)
        written.append(args.output / f"{bench.name}.json")
        written[-1].write_text(json.dumps(document(bench, figures), indent=2) + "\n")
        if plot is not None:
            written.append(args.output / f"{bench.name}.png")
            plot(written[-1], figures)
    print_environment()
    print(f"written to {args.output.resolve()}: {', '.join(path.name for path in written)}")
    return 0


def _measure(bench: Bench, args: argparse.Namespace) -> Any:
    from jaxkv.cli.bench.show import progress  # noqa: PLC0415 -- rich

    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    options = [] if args.full else list(bench.short)
    if bench.name == "serve" and args.no_model:
        options.append("--no-model")
    with progress() as tell:
        return bench.measure(parser.parse_args(options), lambda line: tell(f"{bench.name}: {line}"))
