"""What every benchmark does around its measuring: options, tables or JSON, a plot, a verdict."""

from __future__ import annotations

import argparse
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxkv.cli.bench.series import Tell
from jaxkv.cli.environment import describe_environment
from jaxkv.cli.extras import needs_extra

Verdict = Sequence[str]
"""A line for every target that was missed."""


class Bench(ABC):
    """One question that ``jaxkv bench`` answers. Its figures are of whatever type it likes."""

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    epilog: ClassVar[str]
    short: ClassVar[Sequence[str]] = ()
    """Options with which it is part of a short run of everything."""

    def runs_here(self) -> bool:
        """Whether it measures anything with the devices of this machine."""
        return True

    @abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that say what is measured."""

    @abstractmethod
    def measure(self, args: argparse.Namespace, tell: Tell) -> Any:
        """Measure and return the figures. ``tell`` is told what is going on."""

    @abstractmethod
    def as_json(self, figures: Any) -> dict[str, Any]:
        """The figures as plain values; ``environment`` is added."""

    @abstractmethod
    def load_report(self) -> Callable[[Any], None]:
        """What prints the figures as tables. Imports what it needs."""

    def load_plot(self) -> Callable[[Path, Any], None] | None:
        """What draws the figures into a PNG, if anything does. Imports what it needs."""
        return None

    def missed(self, figures: Any) -> Verdict | None:
        """The targets that were missed; ``None`` for a benchmark without any."""
        return None


def add_bench(benches: Any, bench: Bench) -> None:
    """Add the subcommand of one benchmark."""
    parser = benches.add_parser(
        bench.name,
        help=bench.summary,
        description=bench.description,
        epilog=bench.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    bench.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    defines = type(bench)
    if defines.load_plot is not Bench.load_plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures")
    if defines.missed is not Bench.missed:
        parser.add_argument("--check", action="store_true", help="exit status 1 where a target is missed")
    parser.set_defaults(run=lambda args: run_bench(bench, args))


def run_bench(bench: Bench, args: argparse.Namespace) -> int:
    """Measure, show, and judge if asked to. A missing package is noticed before anything is measured."""
    plot = _load_plot(bench, getattr(args, "plot", None))
    if args.json:
        figures = bench.measure(args, lambda line: print(line, file=sys.stderr))
        print(json.dumps(document(bench, figures), indent=2))
    else:
        with needs_extra("bench", "the table of a benchmark"):
            from jaxkv.cli.bench.show import print_environment, progress  # noqa: PLC0415

            report = bench.load_report()
        with progress() as tell:
            figures = bench.measure(args, tell)
        report(figures)
        print_environment()
    if plot is not None:
        plot(args.plot, figures)
        print(f"plot: {args.plot.resolve()}", file=sys.stderr)
    return _judge(bench, figures) if getattr(args, "check", False) else 0


def document(bench: Bench, figures: Any) -> dict[str, Any]:
    """Everything that was measured, and what with."""
    return {"bench": bench.name, "environment": describe_environment(), **bench.as_json(figures)}


def _load_plot(bench: Bench, path: Path | None) -> Callable[[Path, Any], None] | None:
    if path is None:
        return None
    with needs_extra("bench", "the plot of a benchmark"):
        return bench.load_plot()


def _judge(bench: Bench, figures: Any) -> int:
    missed = bench.missed(figures) or ()
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0
