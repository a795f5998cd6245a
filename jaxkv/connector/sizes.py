"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from jaxkv.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Bytes of ``size``: an int, or digits with a unit such as ``"64MiB"``, ``"1.5 GiB"`` or ``"2GB"``.

    Raises ``ConfigError`` for anything else, fractions of a byte and sizes below one byte included.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"a size is an int or a text such as '64MiB', got {size!r}")
    num_bytes = _parse_text(size) if isinstance(size, str) else size
    if num_bytes < 1:
        raise ConfigError(f"a size must be at least one byte, got {size!r}")
    return num_bytes


def _parse_text(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigError(
            f"cannot read the size {text!r}; write a number with KiB, MiB, GiB, KB, MB, GB or nothing"
        )
    num_bytes = Fraction(found[1]) * _UNITS[found[2].lower()]
    if num_bytes.denominator != 1:
        raise ConfigError(f"the size {text!r} is not a whole number of bytes; write it in a smaller unit")
    return num_bytes.numerator
