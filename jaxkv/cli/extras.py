"""Packages that only some commands need: imported when one runs, and missed with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxkv.errors import ConfigError


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Imports within are of packages ``extra`` installs; ``ConfigError`` says so where one is missing."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {error.name}; install what it uses with: pip install 'jaxkv[{extra}]'"
        ) from error
