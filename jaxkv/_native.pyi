"""Host memory arenas, the slots they are divided into, and the FFI targets that move pages."""

from collections.abc import Callable, Collection, Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

from jaxkv.keys import OffloadKey

class Arena:
    """Host memory that is mapped, touched and registered under ``pool_id`` until it is closed."""

    def __init__(self, num_bytes: int) -> None: ...
    @staticmethod
    def create_shared(num_bytes: int, nonce: str) -> Arena: ...
    @staticmethod
    def attach(pid: int, fd: int, num_bytes: int, nonce: str) -> Arena: ...
    def close(self) -> None: ...
    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def pool_id(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def huge_pages(self) -> bool: ...
    @property
    def shared_fd(self) -> int | None: ...

class SlotPool:
    """Which slots of an arena are in use. Slots are arrays of offsets and epochs, int64 of one length."""

    def __init__(self, capacity_bytes: int, slab_bytes: int) -> None: ...
    def cut(self, slab_bytes: int) -> bool: ...
    def reserve(self, slot_bytes: int) -> tuple[int, int] | None: ...
    def reserve_many(
        self, slot_bytes: int, num_slots: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None: ...
    def free(self, offsets: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> bool: ...
    def pin(self, offsets: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> bool: ...
    def pin_of_size(
        self,
        offsets: npt.NDArray[np.int64],
        epochs: npt.NDArray[np.int64],
        num_bytes: int,
    ) -> npt.NDArray[np.int64] | None:
        """Pins slots all reserved with ``num_bytes`` and gives their addresses (512-byte units), or does
        nothing."""

    def unpin(self, offsets: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> None: ...
    def first_not_live(
        self,
        offsets: npt.NDArray[np.int64],
        epochs: npt.NDArray[np.int64],
        num_bytes: npt.NDArray[np.int64],
    ) -> int | None: ...
    def list_live(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
    def slots_per_slab(self, slot_bytes: int) -> int: ...
    def num_free(self, slot_bytes: int) -> int: ...
    def slab_of(self, offset: int) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def num_slabs(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def num_live(self) -> int: ...

class Found(Enum):
    """What the index knows of a key."""

    MISS = 0
    READABLE = 1
    PENDING = 2

class IndexCounts:
    """What an index holds now (chunks, those used by jobs, and of them those forgotten) and what it did."""

    @property
    def num_chunks(self) -> int: ...
    @property
    def num_in_use(self) -> int: ...
    @property
    def num_forgotten(self) -> int: ...
    @property
    def num_evicted(self) -> int: ...
    @property
    def num_below_threshold(self) -> int: ...

class ChunkIndex:
    """Which chunks a pool holds, who uses them and which go first.

    ``policy`` is ``"lru"``, ``"arc"`` or makes a ``CachePolicy``. Keys are a ``KeyRun``, ``KeyRuns`` or any
    collection of bytes. What does not fit what was prepared is a ``ValueError`` and changes nothing.
    """

    def __init__(
        self,
        pool: SlotPool,
        slot_bytes: Sequence[int],
        policy: str | Callable[[int], object],
        store_threshold: int,
        max_tracked_keys: int,
    ) -> None: ...
    def lookup(self, key: OffloadKey) -> Found: ...
    def lookup_prefix(self, keys: Collection[OffloadKey]) -> tuple[int, bool]:
        """How many keys are found before the first miss, and whether all of those can be read."""

    def lookup_suffix(self, keys: Collection[OffloadKey]) -> tuple[int, bool]: ...
    def begin_request(self, request: str) -> None: ...
    def end_request(self, request: str) -> None: ...
    def prepare_load(
        self, request: str, keys: Collection[OffloadKey]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Offsets and epochs of slots."""

    def complete_load(self, keys: Collection[OffloadKey], success: bool) -> tuple[OffloadKey, ...]:
        """Which of the keys were forgotten."""

    def prepare_store(
        self, request: str, keys: Collection[OffloadKey]
    ) -> tuple[
        bool,
        tuple[OffloadKey, ...] | None,
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        tuple[OffloadKey, ...],
    ]:
        """Whether there is room, the keys to store (``None``: all of them), offsets and epochs of their
        slots, and the keys evicted, which may be some even where there is no room."""

    def prepare_stores(
        self, offers: Sequence[tuple[str, Collection[OffloadKey]]]
    ) -> tuple[
        list[tuple[OffloadKey, ...] | bool | None],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        tuple[OffloadKey, ...],
    ]:
        """As ``prepare_store`` for several (request, keys): ``None`` for one that was refused, ``True`` where
        all keys must be stored, else which; slots group after group, then offer after offer."""

    def complete_store(
        self, keys: Collection[OffloadKey], success: bool, name_keys: bool
    ) -> tuple[OffloadKey, ...]:
        """Which of the keys became readable, if they are to be named."""

    def touch(self, keys: Collection[OffloadKey]) -> None: ...
    def reset(self) -> tuple[OffloadKey, ...]:
        """Forget everything; the keys that were readable."""

    def abandon(self) -> None:
        """Give every slot back, also those in use."""

    def in_use(self) -> list[tuple[OffloadKey, int]]:
        """Keys with their uses."""

    @property
    def counts(self) -> IndexCounts: ...
    @property
    def num_requests(self) -> int:
        """Requests that asked for something and have not ended."""

def first_outside(block_ids: npt.NDArray[np.int64], num_blocks: int) -> int | None:
    """The first index whose id is neither -1 nor below ``num_blocks``."""

def first_repeated(values: npt.NDArray[np.int64]) -> int | None:
    """The first index whose value stood before; negative values may."""

def make_entries(
    block_ids: npt.NDArray[np.int64],
    chunk_addresses: npt.NDArray[np.int64],
    layout: tuple[int, int, int],
    call: tuple[int, int],
    num_entries: int,
) -> tuple[npt.NDArray[np.int32], int]:
    """The call, ids padded with -1, addresses of their records padded with 0; how many ids are not -1.

    ``layout`` is blocks of a chunk, the first block, address units of a record; ``call`` is the pool's
    generation and the number of the call.
    """

def cancel_call(call: int) -> None:
    """The call of this number moves nothing, unless it has begun."""

def forget_call(call: int) -> None:
    """The call of this number has ended."""

def ffi_targets() -> dict[str, object]: ...
def bench_memcpy(
    to: npt.NDArray[np.uint8],
    to_offsets: npt.NDArray[np.int64],
    from_: npt.NDArray[np.uint8],
    from_offsets: npt.NDArray[np.int64],
    run_bytes: int,
    num_threads: int,
    *,
    streaming: bool = False,
) -> None:
    """Copy runs between two arrays of bytes, one after another in each thread. For benchmarks.

    ``streaming`` does not read what it overwrites, where the processor can.
    """

def copy_loop() -> str:
    """The loop that copies pages: ``avx512``, ``avx2``, ``neon`` or ``portable``.

    Raises ``ConfigError`` if ``JAXKV_COPY`` names one that does not run here; so does ``ffi_targets``.
    """

def gather_into_large_pages(address: int, num_bytes: int) -> int:
    """Has the kernel hold this memory in pages of 2 MiB, where they fit inside, whoever uses it meanwhile.

    Returns the bytes it was asked for and did not refuse.
    """
