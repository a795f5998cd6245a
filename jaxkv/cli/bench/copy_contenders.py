"""Ways to bring blocks from caches to host memory and back: jaxkv's, and those that one would use without it.

Every one moves the same blocks, in the same random order, out of memory as XLA allocates it. The others get
what helps them: buffers that were touched before (in huge pages, where NumPy asks for them), ids known to be
valid, leaves given away, and leaves of their own, so that no view of a leaf slows down a donation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxkv.cli.bench.copy_caches import GROUP, Shape, fill
from jaxkv.cli.bench.series import Contender, interleave
from jaxkv.errors import ConfigError
from jaxkv.host_pool import HostPool, load_native
from jaxkv.slots import Slots
from jaxkv.transfer import BlockTransfer, Ticket

OFFLOAD, RESTORE = "offload", "restore"
JAXKV = "jaxkv"
COPYING = "jaxkv, copying alone"
ROOF = "one copy, contiguous"
MEMCPY = "memcpy by page"
TAKE_ONE, TAKE_ALL = "np.take, 1 thread", "np.take, all threads"
PUT_ONE, PUT_ALL = "a[ids] = b, 1 thread", "a[ids] = b, all threads"
EAGER = "leaf[ids], not jitted"
JIT_COPY = "jit gather + copy"
JIT_PINNED = "jit gather, pinned_host"
PUT_PINNED = "jit gather + device_put"
SCATTER = "jit scatter"
SCATTER_HOST = "jit scatter of host pages"
SCATTER_PINNED = "device_put + jit scatter"

_PIECES_A_THREAD = 4  # So that a thread that is held up does not hold up all.

_wait: Any = jax.block_until_ready  # jax does not annotate it


@final
class JaxkvSide:
    """Caches, pool and slots of jaxkv; both directions through its public calls."""

    def __init__(self, shape: Shape, pool: HostPool, block_ids: npt.NDArray[np.int32]) -> None:
        self._caches: Any = {f"layer.{i}": fill(shape.leaf_shape) for i in range(shape.num_leaves)}
        self._transfer = BlockTransfer(shape.make_canonical(self._caches), pool)
        self._caches = self._transfer.warm_up(self._caches, len(block_ids))
        self._block_ids = block_ids
        with self._transfer.reserve(GROUP, len(block_ids)) as slots:
            self._slots: Slots = slots.keep()
        self._copying_s: list[float] = []

    def offload(self) -> None:
        """All blocks to the pool."""
        self._end(self._transfer.offload(self._caches, GROUP, self._block_ids, self._slots))

    def restore(self) -> None:
        """All blocks back."""
        self._caches, ticket = self._transfer.restore(self._caches, GROUP, self._block_ids, self._slots)
        self._end(ticket)

    def copying_s(self, repeats: int) -> tuple[float, ...]:
        """Seconds that the last transfers copied, as their results say: without what is done around that."""
        return tuple(self._copying_s[-repeats:])

    def _end(self, ticket: Ticket) -> None:
        result = ticket.wait()
        assert result.error is None, result.error
        self._copying_s.append(result.elapsed_s)

    def check(self, shape: Shape) -> None:
        """What offload brought to the pool is what the caches hold, in the first and the last block."""
        for place in (0, -1):
            held = np.frombuffer(self._transfer.pool.view(self._slots[place]), np.float32)
            leaf = next(iter(self._caches.values()))
            page = np.asarray(jnp.take(leaf, int(self._block_ids[place]), axis=shape.block_axis)).reshape(-1)
            assert np.array_equal(held[: page.size], page), "the pool holds other bytes than the caches"

    @property
    def num_copied_leaves(self) -> int:
        """Leaves that a restore could not write in place."""
        return self._transfer.num_copied_leaves

    def close(self) -> None:
        """Give the slots back."""
        self._transfer.release(self._slots)


class Runs(NamedTuple):
    """Where runs begin, in bytes of an array."""

    array: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]


@final
class HostSide:
    """Leaves one after another in memory of XLA, NumPy buffers as large, and copies by the host."""

    def __init__(self, shape: Shape, block_ids: npt.NDArray[np.int32], num_threads: int) -> None:
        self._shape, self._block_ids, self._num_threads = shape, block_ids, num_threads
        if jax.default_backend() != "cpu":
            raise ConfigError(
                f"the host cannot copy arrays on {jax.default_backend()}; set JAX_PLATFORMS=cpu, or "
                "measure a GPU with 'jaxkv bench cuda'"
            )
        self._threads = ThreadPoolExecutor(num_threads)
        self._owner = fill((shape.num_leaves, *shape.leaf_shape))
        self.leaves = _writable(self._owner)
        self.buffers = np.ones_like(self.leaves)
        self._source = np.ones_like(self.leaves)
        self._native = load_native()
        self._streams: bool | None = None
        runs = shape.run_offsets(block_ids)
        leaf_bytes = self.leaves[0].nbytes
        firsts = np.arange(shape.num_leaves, dtype=np.int64)[:, None] * leaf_bytes
        self._in_leaves = np.ascontiguousarray((firsts + runs).reshape(-1))
        self._in_order = np.arange(len(self._in_leaves), dtype=np.int64) * shape.run_bytes

    def copy_contiguous(self) -> None:
        """As many bytes from one NumPy array to another, in order, in the way that is faster here."""
        if self._streams is None:
            ways = [Contender(str(way), partial(self._copy_all, streaming=way)) for way in (True, False)]
            seconds = interleave(ways, 3)
            self._streams = min(seconds["True"]) < min(seconds["False"])
        self._copy_all(streaming=self._streams)

    def _copy_all(self, *, streaming: bool) -> None:
        """Past the cache in pieces of a MiB, or with ``memcpy`` in one piece a thread."""
        num_pieces = max(1, self._source.nbytes >> 20) if streaming else self._num_threads
        piece = self._source.nbytes // num_pieces
        starts = np.arange(num_pieces, dtype=np.int64) * piece
        self._copy(Runs(self.buffers, starts), Runs(self._source, starts), piece, streaming=streaming)

    def copy_out(self) -> None:
        """``memcpy`` of each page, or each run of it."""
        runs = Runs(self.buffers, self._in_order), Runs(self.leaves, self._in_leaves)
        self._copy(*runs, self._shape.run_bytes)

    def copy_in(self) -> None:
        """The same to where the pages came from."""
        runs = Runs(self.leaves, self._in_leaves), Runs(self.buffers, self._in_order)
        self._copy(*runs, self._shape.run_bytes)

    def take(self, num_threads: int) -> None:
        """``np.take`` into the buffer; the ids are divided among threads."""
        axis = self._shape.block_axis

        def take(ids: npt.NDArray[np.int32], part: slice) -> None:
            for leaf, buffer in zip(self.leaves, self.buffers, strict=True):
                np.take(leaf, ids, axis=axis, out=buffer[self._shape.index(part)], mode="clip")

        self._divided(take, num_threads)

    def put(self, num_threads: int) -> None:
        """Assignment to the blocks of the leaves; the ids are divided among threads."""

        def put(ids: npt.NDArray[np.int32], part: slice) -> None:
            for leaf, buffer in zip(self.leaves, self.buffers, strict=True):
                leaf[self._shape.index(ids)] = buffer[self._shape.index(part)]

        self._divided(put, num_threads)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _divided(self, work: Any, num_threads: int) -> None:
        num_parts = 1 if num_threads == 1 else num_threads * _PIECES_A_THREAD
        cuts = np.linspace(0, len(self._block_ids), num_parts + 1).astype(int).tolist()
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        if num_threads == 1:
            work(self._block_ids, parts[0])
        else:
            list(self._threads.map(work, [self._block_ids[part] for part in parts], parts))

    def _copy(self, to: Runs, source: Runs, run_bytes: int, *, streaming: bool = False) -> None:
        flat_to, flat_source = (runs.array.reshape(-1).view(np.uint8) for runs in (to, source))
        self._native.bench_memcpy(
            flat_to,
            to.offsets,
            flat_source,
            source.offsets,
            run_bytes,
            self._num_threads,
            streaming=streaming,
        )


def _writable(array: jax.Array) -> npt.NDArray[np.float32]:
    """The memory of ``array``, which must outlive it and be given to no program."""
    memory = (ctypes.c_float * array.size).from_address(array.unsafe_buffer_pointer())
    floats: npt.NDArray[np.float32] = np.ctypeslib.as_array(memory)
    return floats.reshape(array.shape)


@final
class JaxSide:
    """Leaves of their own, moved with plain JAX."""

    def __init__(
        self, shape: Shape, block_ids: npt.NDArray[np.int32], buffers: npt.NDArray[np.float32]
    ) -> None:
        self._shape, self._buffers = shape, buffers
        self._ids = jnp.asarray(block_ids)
        self.leaves = [fill(shape.leaf_shape) for i in range(shape.num_leaves)]
        self.pages: list[jax.Array] = []
        self.pinned_pages: list[jax.Array] = []
        device = self._ids.devices().pop()
        kinds = {memory.kind for memory in device.addressable_memories()}
        self.has_pinned = "pinned_host" in kinds
        self._pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._on_device = jax.sharding.SingleDeviceSharding(device)
        self._gather = jax.jit(self._gather_blocks)
        self._gather_pinned = jax.jit(self._gather_blocks, out_shardings=self._pinned)
        self._scatter = jax.jit(self._scatter_blocks, donate_argnums=0)

    def eager(self) -> None:
        """Index, and wait."""
        index = self._shape.index(self._ids)
        _wait([leaf[index] for leaf in self.leaves])

    def gather_and_copy(self) -> None:
        """Gather, and copy what comes to a buffer in host memory."""
        for page, buffer in zip(self._gather(self.leaves, self._ids), self._buffers, strict=True):
            np.copyto(buffer, np.asarray(page))

    def gather_pinned(self) -> None:
        """Gather into memory of kind ``pinned_host``."""
        _wait(self._gather_pinned(self.leaves, self._ids))

    def gather_and_put(self) -> None:
        """Gather, and ``device_put`` what comes to memory of kind ``pinned_host``."""
        _wait(jax.device_put(self._gather(self.leaves, self._ids), self._pinned))

    def make_pages(self) -> None:
        """Pages on the device, for a scatter to read."""
        if not self.pages:
            self.pages = _wait(self._gather(self.leaves, self._ids))

    def scatter(self) -> None:
        """Write pages that are on the device already; the leaves are donated."""
        self.leaves = _wait(self._scatter(self.leaves, self._ids, self.pages))

    def scatter_from_host(self) -> None:
        """Write pages that are in host memory; the leaves are donated."""
        pages = [jnp.array(buffer) for buffer in self._buffers]
        self.leaves = _wait(self._scatter(self.leaves, self._ids, pages))

    def put_pinned_pages(self) -> None:
        """Pages in memory of kind ``pinned_host``, to be put on the device."""
        if not self.pinned_pages:
            self.pinned_pages = _wait(jax.device_put(self._gather(self.leaves, self._ids), self._pinned))

    def scatter_from_pinned(self) -> None:
        """``device_put`` of pages of kind ``pinned_host``, and a scatter; the leaves are donated."""
        pages = jax.device_put(self.pinned_pages, self._on_device)
        self.leaves = _wait(self._scatter(self.leaves, self._ids, pages))

    def _gather_blocks(self, leaves: Sequence[jax.Array], ids: jax.Array) -> list[jax.Array]:
        index = self._shape.index(ids)
        return [leaf.at[index].get(mode="promise_in_bounds", unique_indices=True) for leaf in leaves]

    def _scatter_blocks(
        self, leaves: Sequence[jax.Array], ids: jax.Array, pages: Sequence[jax.Array]
    ) -> list[jax.Array]:
        index = self._shape.index(ids)
        return [
            leaf.at[index].set(page, mode="promise_in_bounds", unique_indices=True)
            for leaf, page in zip(leaves, pages, strict=True)
        ]


def offload_contenders(ours: JaxkvSide, host: HostSide, plain: JaxSide, num_threads: int) -> list[Contender]:
    """Those that bring blocks to host memory."""
    found = [
        Contender(JAXKV, ours.offload),
        Contender(ROOF, host.copy_contiguous),
        Contender(MEMCPY, host.copy_out),
        Contender(TAKE_ONE, lambda: host.take(1)),
    ]
    if num_threads > 1:
        found.append(Contender(TAKE_ALL, lambda: host.take(num_threads)))
    if plain.has_pinned:
        found.append(Contender(JIT_PINNED, plain.gather_pinned))
        found.append(Contender(PUT_PINNED, plain.gather_and_put))
    return [*found, Contender(JIT_COPY, plain.gather_and_copy), Contender(EAGER, plain.eager)]


def restore_contenders(ours: JaxkvSide, host: HostSide, plain: JaxSide, num_threads: int) -> list[Contender]:
    """Those that bring blocks back."""
    found = [
        Contender(JAXKV, ours.restore),
        Contender(ROOF, host.copy_contiguous),
        Contender(MEMCPY, host.copy_in),
        Contender(PUT_ONE, lambda: host.put(1)),
    ]
    if num_threads > 1:
        found.append(Contender(PUT_ALL, lambda: host.put(num_threads)))
    return [
        *found,
        Contender(SCATTER, plain.scatter, plain.make_pages),
        Contender(SCATTER_HOST, plain.scatter_from_host),
    ]
