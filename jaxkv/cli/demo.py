"""``jaxkv demo``: a multi-turn workload on a small device cache, with offloading off and on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxkv.cli.arguments import count, size
from jaxkv.cli.extras import needs_extra

_EPILOG = """\
Several people talk about three long documents. The device cache cannot hold all of the conversations,
so by the time the second turns come, the first ones have been pushed out: without offloading they are
computed again, with it they come back from the host pool. Exit status 1 if tokens differ or nothing was
loaded.
"""


def add_parser(commands: Any) -> None:
    """Add ``demo`` to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="serve Gemma 3 270M with offloading off and on, and compare",
        description="Serve a multi-turn workload with offloading off and on, and compare.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default="gemma3-270m", help="gemma3-270m, or a .gguf file of a Gemma 3 model"
    )
    parser.add_argument("--device-bytes", type=size, default="48MiB", help="device cache (default 48MiB)")
    parser.add_argument("--host-bytes", type=size, default="1GiB", help="host pool (default 1GiB)")
    parser.add_argument(
        "--document-tokens", type=count, default=1400, help="length of a document (default 1400)"
    )
    parser.add_argument("--reply-tokens", type=count, default=16, help="length of a reply (default 16)")
    parser.add_argument("--plot", type=Path, default=Path("jaxkv-demo.png"), help="where the plot goes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if the tokens are equal and something was loaded."""
    with needs_extra("demo", "the demo"):
        from jaxkv.cli import demo_run  # noqa: PLC0415
    return demo_run.run_demo(args)
