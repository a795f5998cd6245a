"""``jaxkv bench memory``: what pools cost to make, and what transfers take beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import jax

from jaxkv.cli.arguments import count, size
from jaxkv.cli.bench.base import Bench, Verdict
from jaxkv.cli.bench.memory_measure import GIB, MemoryFigures, MemorySettings, measure_memory
from jaxkv.cli.bench.series import Tell

_EPILOG = """\
A pool's memory is there before the first transfer: mapped, advised to be huge pages, and touched by several
threads.
  cold        the first pool of a fresh process. Where the machine is virtual, its memory may be new to the
              host as well, which takes many times longer
  warm        pools made after it, in the same process
  np.ones     as many bytes of NumPy, by one thread, warm
  MiB beside  how far the peak of resident memory was above what the pool holds
The second table is the peak of resident memory while blocks move, above what caches, pool and buffers hold.
"""


@final
class MemoryBench(Bench):
    """Makes pools, and watches resident memory."""

    name = "memory"
    summary = "what pools cost to make, and what transfers take beside them"
    description = "Time making pools, and watch the memory that transfers take."
    epilog = _EPILOG
    short = ("--repeats", "3")

    def runs_here(self) -> bool:
        """See ``Bench``."""
        return jax.default_backend() == "cpu"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        usual = MemorySettings()
        parser.add_argument(
            "--pools", type=size, nargs="+", default=list(usual.pool_bytes), metavar="BYTES",
            help="sizes of pools (default 1GiB 4GiB)",
        )  # fmt: skip
        parser.add_argument("--bytes", type=size, default=usual.moved_bytes, help="moved (default 512MiB)")
        parser.add_argument("--repeats", type=count, default=usual.repeats, help="warm pools (default 5)")

    def measure(self, args: argparse.Namespace, tell: Tell) -> MemoryFigures:
        """See ``Bench``."""
        return measure_memory(MemorySettings(tuple(args.pools), args.bytes, args.repeats), tell)

    def as_json(self, figures: MemoryFigures) -> dict[str, Any]:
        """See ``Bench``. Times in seconds."""
        pools = [
            {
                "bytes": pool.num_bytes,
                "cold_s": pool.cold_s,
                "measurements": [pool.warm.as_json(), pool.numpy.as_json()],
                "huge_pages": pool.huge_pages,
                "extra_bytes": pool.extra_bytes,
            }
            for pool in figures.pools
        ]
        peaks = [asdict(peak) for peak in figures.peaks]
        return {"pools": pools, "too_large": figures.too_large, "peaks": peaks}

    def load_report(self) -> Callable[[MemoryFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.memory_report import print_memory  # noqa: PLC0415

        return print_memory

    def load_plot(self) -> Callable[[Path, MemoryFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.memory_plot import save_memory_plot  # noqa: PLC0415

        return save_memory_plot

    def missed(self, figures: MemoryFigures) -> Verdict:
        """See ``Bench``."""
        return [
            f"a pool of {pool.num_bytes / GIB:g} GiB: {pool.warm.median_s:.3f} s, "
            f"at most {pool.warm.target_s or 0:g}"
            for pool in figures.pools
            if not pool.warm.met
        ]
