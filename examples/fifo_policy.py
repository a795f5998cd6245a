"""An eviction policy in Python: the chunk stored first is given up first, however often it was read."""

from collections.abc import Iterator

from jaxkv.keys import OffloadKey
from jaxkv.offload import CachePolicy


class FIFOPolicy(CachePolicy):
    """A dict keeps keys in the order in which they came."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.keys: dict[OffloadKey, None] = {}

    def insert(self, key: OffloadKey) -> None:
        """See ``CachePolicy``."""
        self.keys[key] = None

    def remove(self, key: OffloadKey, *, evicted: bool) -> None:
        """See ``CachePolicy``."""
        del self.keys[key]

    def victims(self) -> Iterator[OffloadKey]:
        """See ``CachePolicy``."""
        return iter(self.keys)
