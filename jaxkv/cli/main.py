"""The ``jaxkv`` command: parses arguments, hands over to one module per subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxkv.cli import bench, demo, doctor, replay
from jaxkv.errors import JaxKVError

_DESCRIPTION = "KV cache offloading for JAX serving stacks."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors that jaxkv names are printed, not traced."""
    parser = argparse.ArgumentParser(prog="jaxkv", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, replay, bench, doctor):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except JaxKVError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
