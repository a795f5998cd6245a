"""``jaxkv bench copy``: how fast blocks move, beside what one would do without jaxkv."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import jax

from jaxkv.cli.arguments import count, size
from jaxkv.cli.bench.base import Bench, Verdict
from jaxkv.cli.bench.copy_caches import SMALLEST_PAGE
from jaxkv.cli.bench.copy_measure import CopyFigures, CopySettings, measure_copy, size_name
from jaxkv.cli.bench.series import Tell

_EPILOG = """\
A page is what a block has in one leaf. All blocks of the leaves move, in random order, by offload and restore
of BlockTransfer, checks, pins and tickets included; slots were reserved before. The last column has leaves
with heads before blocks, [2, heads, blocks, tokens, size]: 16 runs of 4 KiB make a page there.

"Copying alone" is what of that the compiled loops took, as the result of a transfer says: the rest goes by
blocks, not by bytes, so it shows where blocks are small. Several leaves make a block larger.

Beside it, in the same rounds, on leaves and buffers of their own that were touched before:
  one copy, contiguous     as many bytes in order, by memcpy or by plain streaming stores, whatever is
                           faster: what the memory can do
  memcpy by page           memcpy of each page, or run, the pages divided among threads
  np.take, a[ids] = b      NumPy, into a buffer (mode="clip") and back
  jit gather ...           leaf.at[ids].get, then: copied to a buffer, or compiled to give memory of kind
                           pinned_host, or device_put there
  leaf[ids], not jitted    as one would type it
  jit scatter              leaf.at[ids].set(pages), donated, the pages on the device before; "of host pages"
                           brings them there first
Rates are medians. Times are medians over rounds of what one took over what jaxkv took in the same round: they
hold where rates do not, on a machine with other work. What they should be at least, with two threads or more,
stands below; red misses it. The whole run needs about 8 times --bytes of memory.
"""


def page_size(text: str) -> int:
    """Bytes of a page, a multiple of the smallest."""
    num_bytes = size(text)
    if num_bytes < SMALLEST_PAGE or num_bytes % SMALLEST_PAGE:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4KiB, got {text!r}")
    return num_bytes


@final
class CopyBench(Bench):
    """Moves blocks in both directions."""

    name = "copy"
    summary = "how fast blocks move, beside memcpy, NumPy and plain JAX"
    description = "Time moving blocks to the host pool and back, beside other ways to do it."
    epilog = _EPILOG
    short = ("--bytes", "128MiB", "--repeats", "3")

    def runs_here(self) -> bool:
        """See ``Bench``."""
        return jax.default_backend() == "cpu"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        usual = CopySettings()
        names = " ".join(size_name(page).replace(" ", "") for page in usual.page_bytes)
        parser.add_argument(
            "--pages", type=page_size, nargs="+", default=list(usual.page_bytes), metavar="BYTES",
            help=f"page sizes, multiples of 4KiB (default {names})",
        )  # fmt: skip
        parser.add_argument(
            "--leaves", type=count, nargs="+", default=list(usual.num_leaves), metavar="N",
            help="numbers of leaves (default 1)",
        )  # fmt: skip
        parser.add_argument(
            "--threads", type=count, nargs="+", default=[], metavar="N",
            help="numbers of threads, each in a process with as many processors (default: all there are)",
        )  # fmt: skip
        parser.add_argument("--bytes", type=size, default=usual.moved_bytes, help="moved (default 512MiB)")
        parser.add_argument("--repeats", type=count, default=usual.repeats, help="rounds (default 7)")
        parser.add_argument("--no-strided", action="store_true", help="without heads before blocks")

    def measure(self, args: argparse.Namespace, tell: Tell) -> CopyFigures:
        """See ``Bench``."""
        settings = CopySettings(
            page_bytes=tuple(args.pages),
            num_leaves=tuple(args.leaves),
            num_threads=tuple(args.threads),
            moved_bytes=args.bytes,
            repeats=args.repeats,
            strided=not args.no_strided,
        )
        return measure_copy(settings, tell)

    def as_json(self, figures: CopyFigures) -> dict[str, Any]:
        """See ``Bench``."""
        strided = [
            {"direction": result.direction, "leaves": result.shape.num_leaves,
             "threads": result.num_threads, **ratio.as_json()}
            for result, ratio in figures.strided_ratios
        ]  # fmt: skip
        return {"results": [result.as_json() for result in figures.results], "strided_times": strided}

    def load_report(self) -> Callable[[CopyFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.copy_report import print_copy  # noqa: PLC0415

        return print_copy

    def load_plot(self) -> Callable[[Path, CopyFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.copy_plot import save_copy_plot  # noqa: PLC0415

        return save_copy_plot

    def missed(self, figures: CopyFigures) -> Verdict:
        """See ``Bench``."""
        pairs = [(result, ratio) for result in figures.results for ratio in result.ratios]
        return [
            f"{result.direction} of {size_name(result.shape.page_bytes)} pages against {ratio.name}: "
            f"{ratio.median:.2f} times, at least {ratio.at_least:g}"
            for result, ratio in (*pairs, *figures.strided_ratios)
            if ratio.at_least is not None and not ratio.met
        ]
