"""Moves blocks of a model's caches to slots of a host pool and back. Knows ids and bytes, no requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self, final, overload

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxkv.canonical import CanonicalKVCaches
from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.keys import GroupId
from jaxkv.records import GroupRecord
from jaxkv.shared_pool import AnyPool
from jaxkv.slots import Int64s, Slot, Slots
from jaxkv.transfer.backends import TransferBackend, XlaBackend
from jaxkv.transfer.checks import (
    Entries,
    as_slots,
    bucket_size,
    check_block_ids,
    check_enough_slots,
    check_first_block,
    check_no_repeats,
    check_slots_differ,
    make_entries,
)
from jaxkv.transfer.cpu import CpuBackend
from jaxkv.transfer.cuda import CudaBackend
from jaxkv.transfer.cuda_device import has_cuda
from jaxkv.transfer.movers import GroupMover, make_group_mover
from jaxkv.transfer.targets import has_platform
from jaxkv.transfer.ticket import Move, Ticket
from jaxkv.transfer.under_way import SlotUse, transfers_under_way

KVCaches = Mapping[str, Any]

_log = logging.getLogger(__name__)
_calls = count()


@final
class SlotLease(Sequence[Slot]):
    """Slots that are freed when the ``with`` block ends, unless ``keep`` was called."""

    def __init__(self, transfer: BlockTransfer, slots: Slots) -> None:
        self._transfer = transfer
        self._slots = slots
        self._kept = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept and not self._transfer.pool.closed:
            self._transfer.release(self._slots)

    def keep(self) -> Slots:
        """Hand the slots over; ``BlockTransfer.release`` frees them."""
        self._kept = True
        return self._slots

    @overload
    def __getitem__(self, index: int) -> Slot: ...
    @overload
    def __getitem__(self, index: slice) -> Slots: ...
    def __getitem__(self, index: int | slice) -> Slot | Slots:
        return self._slots[index]

    def __len__(self) -> int:
        return len(self._slots)


@final
class BlockTransfer:
    """Copies blocks between the caches ``canonical`` describes and slots of ``pool``.

    A slot holds a chunk: ``blocks_per_chunk`` block records, one after another. ``backend`` is ``"cpu"`` or
    ``"cuda"`` (compiled handlers, in place), ``"xla"`` (plain JAX, any platform) or ``"auto"``: the first of
    these that fits the default platform. Of caches on a mesh it moves the blocks of one ``data_shard``, in
    the shards that this process drives. Transfers may be started from several threads. Whatever is refused
    raises before anything is dispatched and leaves the caches usable.

    With ``layerwise`` a restore is a program for each layer, in the order of the config, so that a model
    dispatched layer by layer begins before the last layer is there. A model that is one program waits for all
    its leaves either way.

    Raises ``ConfigError`` for options that cannot work and ``NativeError`` for a backend this build
    does not have.
    """

    def __init__(
        self,
        canonical: CanonicalKVCaches,
        pool: AnyPool,
        blocks_per_chunk: int = 1,
        backend: str = "auto",
        *,
        data_shard: int = 0,
        layerwise: bool = False,
    ) -> None:
        if not isinstance(blocks_per_chunk, int | np.integer) or blocks_per_chunk < 1:
            raise ConfigError(
                f"blocks_per_chunk must be a whole number of at least 1, got {blocks_per_chunk!r}"
            )
        self.canonical = canonical
        self.pool = pool
        self.blocks_per_chunk = blocks_per_chunk
        self.backend = make_backend(backend, pool)
        self.movers = _make_movers(self.backend, canonical, data_shard, layerwise=layerwise)
        self._generation = int(pool.token()[0])
        # XLA's CPU client runs what one thread launches one after another, so that layers launched here would
        # keep the caller's programs waiting until the last of them is there.
        self._launcher = ThreadPoolExecutor(1, "jaxkv-restore") if layerwise else None
        self._lock = threading.Lock()
        self._under_way = transfers_under_way(pool)
        self._under_way.settle()
        self._num_copied_leaves = 0
        pool.fit_slabs(self.chunk_bytes(GroupId(g)) for g in range(len(canonical.groups)))

    def chunk_bytes(self, group: GroupId) -> int:
        """Bytes of one slot of ``group``."""
        return self.blocks_per_chunk * self._record(group).record_bytes

    @property
    def num_copied_leaves(self) -> int:
        """Leaves that restores could not write in place so far: 0 unless something else holds on to them."""
        return self._num_copied_leaves

    def reserve(self, group: GroupId, num_chunks: int) -> SlotLease:
        """Slots for ``num_chunks`` chunks of ``group``. Raises ``PoolFull``, and then keeps nothing."""
        self.settle()
        return SlotLease(self, self.pool.reserve_slots(self.chunk_bytes(group), num_chunks))

    def release(self, slots: Sequence[Slot]) -> None:
        """Free kept slots. Waits for nothing: a slot in a running transfer frees when that ends."""
        self.settle()
        self.pool.free_slots(slots[:])

    def offload(
        self,
        kv_caches: KVCaches,
        group: GroupId,
        block_ids: ArrayLike,
        slots: Sequence[Slot],
        first_block: int = 0,
    ) -> Ticket:
        """Copy what blocks of ``group`` hold now to ``slots``, whatever is computed from the caches later.

        ``block_ids[j]`` (-1 skips) is block ``first_block + j`` counted from the start of the first chunk.
        The caches stay the caller's; they may be donated as soon as this returns.

        Raises ``BlockIdError``, ``SlotError``, ``CacheMismatchError``,
        ``DeletedCacheError``, ``PoolClosedError`` or ``PoolForkedError``.
        """
        leaves = self._leaves(kv_caches, group)
        chunks = self._chunks(group, slots)
        check_slots_differ(chunks)
        ids = check_block_ids(block_ids, self._record(group).num_blocks)
        use = SlotUse(chunks, self._launched_by(threading.current_thread()), writes_pool=True)
        self._under_way.wait_for_turn(use)
        with self._pinned(group, ids, chunks, first_block) as entries:
            moves = []
            if entries.num_blocks:
                self._under_way.prefetched.forget(chunks.epochs)
                with _span("jaxkv.offload", group, entries):
                    moves = self.movers[group].offload(leaves, entries)
        return self._under_way.start(group, use, moves)

    def prefetch(self, group: GroupId, slots: Sequence[Slot]) -> Ticket:
        """Start moving slots towards the device, ahead of ``restore``, beside whatever the device does.

        On a CUDA device a later ``restore`` of these slots finds what they held now in staging memory, as far
        as that has room. On the CPU, and for blocks spread over several devices, there is nothing to do.
        """
        chunks = self._chunks(group, slots)
        use = SlotUse(chunks, self._launched_by(self), writes_pool=False)
        self._under_way.wait_for_turn(use)
        every_block = np.zeros(len(chunks) * self.blocks_per_chunk, np.int64)
        with self._pinned(group, every_block, chunks, 0) as entries:
            moves = self.movers[group].prefetch(entries)
        if moves:
            self._under_way.prefetched.add(chunks.epochs, self.movers[group].place())
        return self._under_way.start(group, use, moves)

    def restore(
        self,
        kv_caches: KVCaches,
        group: GroupId,
        block_ids: ArrayLike,
        slots: Sequence[Slot],
        first_block: int = 0,
    ) -> tuple[KVCaches, Ticket]:
        """Copy chunks back into blocks of ``group``, in place. Go on with the caches returned.

        Arguments and errors as for ``offload``; a block named twice is a ``BlockIdError``. The
        leaves of the group are consumed. Where something else holds one (a NumPy view does), XLA copies it
        whole first; then ``num_copied_leaves`` counts and the first time is logged.
        """
        leaves = self._leaves(kv_caches, group)
        chunks = self._chunks(group, slots)
        ids = check_block_ids(block_ids, self._record(group).num_blocks)
        check_no_repeats(ids)
        moves: list[Move] = []
        launcher = self._launcher or threading.current_thread()
        use = SlotUse(chunks, self._launched_by(launcher), writes_pool=False)
        self._under_way.wait_for_turn(use)
        with self._pinned(group, ids, chunks, first_block) as entries:
            if entries.num_blocks:
                if not self._under_way.prefetched.take(chunks.epochs, self.movers[group].place(leaves)):
                    self.movers[group].forget_prefetched(leaves, entries)
                with _span("jaxkv.restore", group, entries):
                    kv_caches, moves = self._write(kv_caches, group, leaves, entries)
        return kv_caches, self._under_way.start(group, use, moves)

    def warm_up(self, kv_caches: KVCaches, max_blocks: int) -> KVCaches:
        """Compile what transfers of up to ``max_blocks`` blocks need, and bring caches on the CPU into large
        pages of memory. Consumes ``kv_caches`` and returns those to go on with, unchanged.
        """
        for group in map(GroupId, range(len(self.canonical.groups))):
            num_entries = bucket_size(1)
            while num_entries <= bucket_size(max_blocks):
                written = self.movers[group].warm_up(self._leaves(kv_caches, group), num_entries)
                kv_caches = self.canonical.replace(kv_caches, group, list(written.values()))
                num_entries = bucket_size(num_entries + 1)
        return kv_caches

    def settle(self) -> None:
        """Let go of slots whose transfers have ended. Waits for nothing."""
        self._under_way.settle()

    def _launched_by(self, launcher: object) -> object:
        """What orders a transfer after others: whatever launches it, or nothing but the transfer itself."""
        return launcher if self.backend.orders_launches else object()

    def _record(self, group: GroupId) -> GroupRecord:
        records = self.canonical.records
        if not 0 <= group < len(records):
            raise ConfigError(f"there is no group {group}; the caches have groups 0 to {len(records) - 1}")
        return records[group]

    def _chunks(self, group: GroupId, slots: Sequence[Slot]) -> Slots:
        """Slots as they are now, as arrays; of a ``SlotLease`` those it holds."""
        return as_slots(slots if isinstance(slots, Slots) else slots[:], self.chunk_bytes(group))

    def _leaves(self, kv_caches: KVCaches, group: GroupId) -> dict[int, jax.Array]:
        self._record(group)
        leaves = self.canonical.group_leaves(kv_caches, group)
        if any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, leaves))):
            raise CacheMismatchError(
                "a BlockTransfer moves concrete arrays and cannot be called inside jit; "
                "use jaxkv.transfer.offload and restore there"
            )
        return dict(zip(self.canonical.groups[group].leaves, leaves, strict=True))

    @contextmanager
    def _pinned(self, group: GroupId, ids: Int64s, slots: Slots, first_block: int) -> Iterator[Entries]:
        """Checks the slots, pins them and makes what one program is given. An error unpins them."""
        first_block = check_first_block(first_block)
        check_enough_slots(slots, first_block + len(ids), self.blocks_per_chunk)
        self.settle()
        addresses = self.pool.pin(slots)
        try:
            record_bytes = self._record(group).record_bytes
            yield make_entries(
                ids,
                addresses,
                record_bytes,
                self.blocks_per_chunk,
                first_block,
                (self._generation, next(_calls) % 2**31),
            )
        except BaseException:
            self.pool.unpin(slots)
            raise

    def _write(
        self, kv_caches: KVCaches, group: GroupId, leaves: Mapping[int, jax.Array], entries: Entries
    ) -> tuple[KVCaches, list[Move]]:
        try:
            if self._launcher is None:
                written, moves = self.movers[group].restore(leaves, entries)
            else:
                written, moves = _result(self._launcher.submit(self.movers[group].restore, leaves, entries))
        except jax.errors.JaxRuntimeError as error:
            _require_distinct_buffers(list(leaves.values()))
            if "external reference" in str(error):
                raise CacheMismatchError(
                    "a cache leaf cannot be written in place, because something else still uses it (a DLPack "
                    f"view does); drop that before restoring: {error}"
                ) from error
            raise
        if self.backend.restores_in_place:
            self._count_copies(sum(move.num_copied_leaves for move in moves))
        return self.canonical.replace(kv_caches, group, list(written.values())), moves

    def _count_copies(self, copied: int) -> None:
        if not copied:
            return
        with self._lock:
            first = self._num_copied_leaves == 0
            self._num_copied_leaves += copied
        if first:
            # Not a warning: where warnings are errors it would cost the caller the restored caches.
            _log.warning(
                "a restore copied %d whole cache leaves, because something else still uses them "
                "(a NumPy or DLPack view does); drop it before restoring",
                copied,
            )


def _span(name: str, group: GroupId, entries: Entries) -> jax.profiler.TraceAnnotation:
    """Names the start of a transfer in traces of ``jax.profiler``; the program has a name of its own."""
    return jax.profiler.TraceAnnotation(name, group=group, num_blocks=entries.num_blocks)


def _result(
    restoring: Future[tuple[dict[int, jax.Array], list[Move]]],
) -> tuple[dict[int, jax.Array], list[Move]]:
    """What was restored. An interrupt leaves no program behind that still uses slots about to be unpinned."""
    try:
        return restoring.result()
    except BaseException:
        if restoring.exception() is None:
            for move in restoring.result()[1]:
                move.read()
        raise


def make_backend(name: str, pool: AnyPool) -> TransferBackend:
    """The backend of that name. ``"auto"`` is the best for the platform that JAX runs on."""
    if name == "auto":
        name = _best_backend(jax.default_backend())
    match name:
        case "cpu":
            return CpuBackend(pool)
        case "xla":
            return XlaBackend(pool)
        case "cuda":
            return CudaBackend(pool)
        case _:
            raise ConfigError(f"unknown backend {name!r}; use 'auto', 'cpu', 'xla' or 'cuda'")


def _best_backend(platform: str) -> str:
    if platform == "gpu" and has_cuda() and has_platform("cuda"):
        return "cuda"
    return "cpu" if platform == "cpu" else "xla"


def _make_movers(
    backend: TransferBackend, canonical: CanonicalKVCaches, data_shard: int, *, layerwise: bool
) -> list[GroupMover]:
    movers = []
    for group, local, record in zip(
        canonical.config.groups, canonical.groups, canonical.records, strict=True
    ):
        if not 0 <= data_shard < record.num_data_shards:
            raise ConfigError(
                f"there is no data shard {data_shard}; the block axes of the caches are split into "
                f"{record.num_data_shards}"
            )
        sharding = canonical.positions.unique[local.leaves[0]].sharding
        devices = () if sharding is None else tuple(sharding.addressable_devices)
        waves = _leaves_by_layer(canonical, group.layer_names) if layerwise else ()
        movers.append(make_group_mover(backend, record, data_shard, devices, waves))
    return movers


def _leaves_by_layer(canonical: CanonicalKVCaches, layer_names: Sequence[str]) -> list[list[int]]:
    """The leaves of each layer, by index, without those of layers before."""
    seen: set[int] = set()
    waves = []
    for name in layer_names:
        waves.append([leaf for leaf in canonical.positions.of_layer[name] if leaf not in seen])
        seen.update(waves[-1])
    return waves


def _require_distinct_buffers(leaves: Sequence[jax.Array]) -> None:
    """Says why XLA refused to donate: two arrays may be one buffer, which it never gives away twice."""
    if any(leaf.is_deleted() or len(leaf.sharding.device_set) > 1 for leaf in leaves):
        return
    if len({leaf.unsafe_buffer_pointer() for leaf in leaves}) != len(leaves):
        raise CacheMismatchError(
            "two cache leaves share one buffer, but were separate when the caches were registered; "
            "give each leaf an array of its own"
        )
