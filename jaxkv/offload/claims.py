"""One owner at a time for what must not be shared: a pool by a backend, a backend by a connector."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from jaxkv.errors import PoolInUseError

_claimed: WeakValueDictionary[int, Any] = WeakValueDictionary()


def claim(resource: object) -> None:
    """Take ``resource``; ``PoolInUseError`` if somebody has it."""
    if id(resource) in _claimed:
        raise PoolInUseError(
            f"{resource!r} belongs to another connector; shut that one down first, "
            "or give each a pool of its own"
        )
    _claimed[id(resource)] = resource


def release(resource: object) -> None:
    """Let somebody else have ``resource``. Safe to call twice."""
    _claimed.pop(id(resource), None)
