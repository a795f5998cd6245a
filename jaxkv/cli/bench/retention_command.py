"""``jaxkv bench retention``: what keeping less of windows and states is worth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from jaxkv.cli.arguments import count, retention, size
from jaxkv.cli.bench.base import Bench
from jaxkv.cli.bench.series import Tell
from jaxkv.replay.models import find_model_shape
from jaxkv.replay.retention import Families, RetentionResult, serve_families

_EPILOG = """\
Prompts are served one after another, more than the pool holds; all prompts of a family begin with the same
tokens. Then the pool alone is asked how much of each it could serve.
  prompts        those it could serve up to their last block
  families       of how many families
  branch points  families whose shared tokens it could serve to a prompt that goes on in a new way
  times          prompts, compared with storing every block of every layer
"""


@final
@dataclass(frozen=True, slots=True)
class RetentionFigures:
    """What a pool of ``host_bytes`` could serve, for each retention interval."""

    model: str
    host_bytes: int
    families: Families
    results: Sequence[RetentionResult]


@final
class RetentionBench(Bench):
    """Counts prompts; measures no time."""

    name = "retention"
    summary = "how many prompts a pool can serve, by what windows and states keep"
    description = "Count the distinct prompts that a host pool of one size can serve."
    epilog = _EPILOG

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
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

    def measure(self, args: argparse.Namespace, tell: Tell) -> RetentionFigures:
        """See ``Bench``."""
        families = Families(
            args.families, args.branches, args.prompt_tokens, args.shared_tokens, args.output_tokens
        )
        groups = find_model_shape(args.model).make_groups(16)
        results = []
        for interval in args.retention:
            tell(f"retention {'dense' if interval is None else interval}")
            results.append(serve_families(groups, families, args.host_bytes, interval))
        return RetentionFigures(args.model, args.host_bytes, families, results)

    def as_json(self, figures: RetentionFigures) -> dict[str, Any]:
        """See ``Bench``."""
        return {"runs": [asdict(result) for result in figures.results]}

    def load_report(self) -> Callable[[RetentionFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.retention_report import print_retention  # noqa: PLC0415

        return print_retention
