"""Which chunk goes first when room is needed. Orders keys; knows neither slots nor requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import final

from jaxkv.errors import ConfigError
from jaxkv.keys import OffloadKey


class CachePolicy(ABC):
    """The evictable chunks of one slot size, in the order in which they are given up.

    A chunk that is being stored or loaded is not in the policy: it is added when its last use ends, which
    counts as a use, and removed when the next one begins. Every method takes constant time.
    """

    @abstractmethod
    def add(self, key: OffloadKey) -> None:
        """A chunk became evictable."""

    @abstractmethod
    def remove(self, key: OffloadKey) -> None:
        """A chunk is evictable no longer: in use again, evicted or forgotten."""

    @abstractmethod
    def touch(self, key: OffloadKey) -> None:
        """An evictable chunk was of use to a request."""

    @abstractmethod
    def __iter__(self) -> Iterator[OffloadKey]:
        """Evictable keys, the next one to give up first. Not to be changed while it runs."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of evictable chunks."""


@final
class LRUPolicy(CachePolicy):
    """Gives up the least recently used chunk first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[OffloadKey, None] = OrderedDict()

    def add(self, key: OffloadKey) -> None:
        """See ``CachePolicy``."""
        self._keys[key] = None

    def remove(self, key: OffloadKey) -> None:
        """See ``CachePolicy``."""
        del self._keys[key]

    def touch(self, key: OffloadKey) -> None:
        """See ``CachePolicy``."""
        self._keys.move_to_end(key)

    def __iter__(self) -> Iterator[OffloadKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


MakePolicy = Callable[[], CachePolicy]
"""Makes an empty policy; called once for each slot size."""

_POLICIES: dict[str, MakePolicy] = {"lru": LRUPolicy}


def find_policy(name: str) -> MakePolicy:
    """The policy called ``name``: ``"lru"``, or the dotted path of a ``CachePolicy`` without arguments.

    Raises ``ConfigError`` for a name that is neither.
    """
    if name in _POLICIES:
        return _POLICIES[name]
    found = load_class(name, CachePolicy, f"eviction policy: one of {sorted(_POLICIES)}")
    return found  # noqa: RET504


def load_class(path: str, base: type, expected: str) -> type:
    """The subclass of ``base`` at a dotted path; ``ConfigError`` says what was ``expected`` instead."""
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(import_module(module_name), class_name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import {path!r} ({error}); give an {expected}, or a dotted path"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{path!r} is no {base.__name__}; give an {expected}, or a dotted path")
    return found
