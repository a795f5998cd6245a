"""Which chunk goes first when room is needed: the names of policies, and the interface to bring one's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module

from jaxkv.errors import ConfigError
from jaxkv.keys import OffloadKey


class CachePolicy(ABC):
    """The chunks of one slot size, in the order in which they are given up.

    It is made with the number of slots of its size that the pool could hold. It hears of a chunk from when it
    gets its slot until it is removed, whether a job uses it or not: what is in use is skipped among the
    victims. Keys of one call come last token first, so that the head of a prefix is heard of last.

    The methods are called from within the manager's and must not call it. What they raise is raised by the
    manager, which forgets the chunks it was about to store.
    """

    @abstractmethod
    def __init__(self, num_slots: int) -> None: ...

    @abstractmethod
    def insert(self, key: OffloadKey) -> None:
        """A chunk got its slot and is being written."""

    @abstractmethod
    def remove(self, key: OffloadKey, *, evicted: bool) -> None:
        """A chunk is there no more: it was given up for another (``evicted``), lost, or never written."""

    @abstractmethod
    def victims(self) -> Iterator[OffloadKey]:
        """Every chunk once, the first to give up first; read as far as needed, before anything changes."""

    def touch(self, key: OffloadKey) -> None:
        """A chunk was of use."""

    def end_request(self, key: OffloadKey, *, inserted: bool, reused: bool) -> None:  # noqa: ARG002
        """A request ended that had asked for this chunk.

        It had found it readable (``reused``), or stored it and read nothing but that (``inserted``), or
        neither. The default takes each for a use.
        """
        self.touch(key)

    def miss_store(self, key: OffloadKey) -> None:
        """A request stores a chunk that is not there; told once for each request and key."""


MakePolicy = Callable[[int], CachePolicy]
"""Makes an empty policy for a number of slots; called once for each slot size."""

_COMPILED = ("arc", "lru")


def find_policy(name: str) -> str | MakePolicy:
    """The policy called ``name``: ``"lru"`` and ``"arc"`` are compiled and stay names, a dotted path is that
    of a ``CachePolicy``.

    Raises ``ConfigError`` for a name that is neither.
    """
    if name in _COMPILED:
        return name
    found = load_class(name, CachePolicy, f"eviction policy: one of {sorted(_COMPILED)}")
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
