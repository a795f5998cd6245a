"""Argument types shared by the subcommands."""

from __future__ import annotations

import argparse

from jaxkv.connector import parse_bytes
from jaxkv.errors import ConfigError


def size(text: str) -> int:
    """A number of bytes such as ``64MiB``."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """A whole number of at least one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def whole(text: str) -> int:
    """A whole number of at least zero."""
    return 0 if text == "0" else count(text)


def share(text: str) -> float:
    """A number within 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number within 0 and 1, got {text!r}")
    return number


def retention(text: str) -> int | None:
    """``dense``, or a retention interval."""
    return None if text == "dense" else whole(text)
