"""``jaxkv bench cuda``: how fast blocks move between a GPU and host memory, beside the link and plain JAX."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, final

import jax

from jaxkv.cli.arguments import count, size
from jaxkv.cli.bench.base import Bench
from jaxkv.cli.bench.copy_command import page_size
from jaxkv.cli.bench.copy_measure import size_name
from jaxkv.cli.bench.cuda_measure import CudaFigures, CudaSettings, measure_cuda
from jaxkv.cli.bench.series import Tell

_EPILOG = """\
A page is what a block has in one leaf. All blocks of the leaves move, in random order, by offload and restore
of BlockTransfer, from the call until the bytes are there; slots were reserved before. The last column has
leaves with heads before blocks, [2, heads, blocks, tokens, size]: 16 runs of 4 KiB make a page there.

"jaxkv" goes the way it chose for this device, which is told above the tables. Below it are all ways it could
go: one kernel between leaves and host memory ("direct"), or through staging memory of the device, and on by
the copy engines or by a kernel. "On the device" is what of that lies between CUDA events.

Beside it, in the same rounds, on leaves of their own:
  the link: one pinned copy   as many bytes in one piece, from device memory to pinned host memory or back
  jit gather + device_put     leaf.at[ids].get, then device_put to memory of kind pinned_host
  jit gather, pinned_host     the same, compiled to give such memory
  jit gather + copy           the same, and NumPy's copy of it to a buffer that was touched before
  device_put + jit scatter    of pages in memory of kind pinned_host; the leaves are donated
  jit scatter of host pages   of pages in NumPy arrays
Rates are medians. Shares of the link are medians over rounds of what one took over what the link took in the
same round. What this JAX cannot do on the device is left out. The run needs about 5 times --bytes of the
device, and as much of the host.
"""


@final
class CudaBench(Bench):
    """Moves blocks of a GPU in both directions."""

    name = "cuda"
    summary = "how fast blocks of a GPU move, beside the link and plain JAX"
    description = "Time moving blocks of a GPU to the host pool and back, beside the link and plain JAX."
    epilog = _EPILOG
    short = ("--bytes", "128MiB", "--repeats", "3", "--leaves", "32")

    def runs_here(self) -> bool:
        """See ``Bench``."""
        return jax.default_backend() == "gpu"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        usual = CudaSettings()
        names = " ".join(size_name(page).replace(" ", "") for page in usual.page_bytes)
        leaves = " ".join(map(str, usual.num_leaves))
        parser.add_argument(
            "--pages", type=page_size, nargs="+", default=list(usual.page_bytes), metavar="BYTES",
            help=f"page sizes, multiples of 4KiB (default {names})",
        )  # fmt: skip
        parser.add_argument(
            "--leaves", type=count, nargs="+", default=list(usual.num_leaves), metavar="N",
            help=f"numbers of leaves (default {leaves})",
        )  # fmt: skip
        parser.add_argument("--bytes", type=size, default=usual.moved_bytes, help="moved (default 256MiB)")
        parser.add_argument("--repeats", type=count, default=usual.repeats, help="rounds (default 5)")
        parser.add_argument("--no-strided", action="store_true", help="without heads before blocks")

    def measure(self, args: argparse.Namespace, tell: Tell) -> CudaFigures:
        """See ``Bench``."""
        settings = CudaSettings(
            page_bytes=tuple(args.pages),
            num_leaves=tuple(args.leaves),
            moved_bytes=args.bytes,
            repeats=args.repeats,
            strided=not args.no_strided,
        )
        return measure_cuda(settings, tell)

    def as_json(self, figures: CudaFigures) -> dict[str, Any]:
        """See ``Bench``."""
        return {
            "device": figures.device,
            "paths": figures.paths,
            "results": [result.as_json() for result in figures.results],
        }

    def load_report(self) -> Callable[[CudaFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.cuda_report import print_cuda  # noqa: PLC0415

        return print_cuda
