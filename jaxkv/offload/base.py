"""The interface of an offloading backend: where chunks are kept (manager) and how they get there (worker).

Follows ``vllm.v1.kv_offload.base``. A backend deals in keys and slots; it never looks inside arrays or
layouts, and hands the cache pytree on unopened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, final

import numpy as np
import numpy.typing as npt

from jaxkv.keys import GroupId, JobId, OffloadKey


class LookupResult(Enum):
    """What a backend knows of one key (vLLM: ``LookupResult``).

    ``HIT_PENDING`` is a chunk that is being written, ``RETRY`` no answer yet: the request asks again in the
    next step, but not for ever.
    """

    MISS = auto()
    HIT = auto()
    HIT_PENDING = auto()
    RETRY = auto()


_FEW = 16
_CERTAINTY = (LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.RETRY)


@final
@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """Answers for neighbouring keys: ``num_found`` of them are no MISS, and ``worst`` is the least certain.

    ``worst`` is HIT where every found key can be read now (and where none was found), else HIT_PENDING, or
    RETRY where any of them answered that.
    """

    num_found: int
    worst: LookupResult = LookupResult.HIT


class OffloadPolicy(Enum):
    """Which chunks of a request are offered to the backend (vLLM: ``OffloadPolicy``).

    ``CHUNK_LEVEL``: those computed here; what was loaded is held already. ``REQUEST_LEVEL``: all of them, for
    backends that want the whole context of a request.
    """

    CHUNK_LEVEL = "chunk_level"
    REQUEST_LEVEL = "request_level"


@final
@dataclass(frozen=True, slots=True)
class ReqContext:
    """The request on whose behalf a backend is asked (vLLM: ``ReqContext``).

    ``kv_transfer_params`` are the request's own, as the serving loop was given them. ``load_tiers`` are the
    media its chunks may come from; ``None`` allows all.
    """

    req_id: str
    kv_transfer_params: Mapping[str, Any] = field(default_factory=dict)
    load_tiers: frozenset[str] | None = None

    def may_load_from(self, medium: str) -> bool:
        """Whether chunks of the request may come from ``medium``. A backend answers MISS where not."""
        return self.load_tiers is None or medium in self.load_tiers


class LoadStoreSpec(ABC):
    """Where a backend keeps an ordered batch of chunks; opaque to everyone but its own worker."""


@final
@dataclass(frozen=True, slots=True)
class PrepareStoreOutput:
    """Which of the offered keys must be written, where, and what had to go (vLLM: ``PrepareStoreOutput``).

    ``keys_to_store`` stand in the order in which they were offered.
    """

    keys_to_store: Sequence[OffloadKey]
    store_spec: LoadStoreSpec
    evicted_keys: Sequence[OffloadKey]


@final
@dataclass(frozen=True, slots=True)
class StepStoreOutput:
    """What became of the stores that a step offers together; they become one job.

    ``keys_to_store`` has an entry for each offer: the keys that must be written, in offered order, or
    ``None`` where there was no room. ``store_spec`` is the place of all of them: group after group, and
    within a group in the order of the offers.
    """

    keys_to_store: Sequence[Sequence[OffloadKey] | None]
    store_spec: LoadStoreSpec
    evicted_keys: Sequence[OffloadKey]


@final
@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """Keys that became loadable (``removed=False``) or are no longer (vLLM: ``OffloadingEvent``)."""

    keys: tuple[OffloadKey, ...]
    medium: str
    removed: bool


@final
@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """Device side of a job in one group: ``block_ids`` (int32) in the order of the job's chunks."""

    group: GroupId
    block_ids: npt.NDArray[np.int32]

    @property
    def num_blocks(self) -> int:
        """Blocks whose bytes are moved."""
        if len(self.block_ids) <= _FEW:  # counting a few is cheaper than asking NumPy to
            return sum(block >= 0 for block in self.block_ids.tolist())
        return int(np.count_nonzero(self.block_ids >= 0))


@final
@dataclass(frozen=True, slots=True)
class TransferJob:
    """One store or load: device blocks by group, and the backend's place for the chunks in the same order.

    A load is of one request; a store may be of several, and names the first.

    The chunks of ``spec`` are ordered group after group as in ``blocks``, ``blocks_per_chunk`` blocks each.
    A store that ``may_follow_step`` is of blocks that the step it is planned in neither writes nor frees, so
    that it reads the same from the caches before the step and from those after.
    """

    job_id: JobId
    req_id: str
    blocks: Sequence[DeviceBlocks]
    spec: LoadStoreSpec
    may_follow_step: bool = False


@final
@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended; ``error`` is ``None`` when every byte was moved (vLLM: ``TransferResult``).

    ``cancelled``: it was called off in time, which says nothing against what is stored.
    """

    job_id: JobId
    num_bytes: int
    elapsed_s: float
    error: str | None = None
    cancelled: bool = False


class OffloadingManager(ABC):
    """Scheduler side of a backend: which chunks it holds. Methods as vLLM's ``OffloadingManager``."""

    @abstractmethod
    def lookup(self, key: OffloadKey, ctx: ReqContext) -> LookupResult:
        """Whether one chunk can be read."""

    def lookup_prefix(self, keys: Sequence[OffloadKey], ctx: ReqContext) -> PrefixLookup:
        """How many of ``keys``, from the first on, are found before the first MISS.

        ``keys`` may be a ``KeyRun``. The default asks ``lookup`` key by key.
        """
        return self._count_found(keys, ctx)

    def lookup_suffix(self, keys: Sequence[OffloadKey], ctx: ReqContext) -> PrefixLookup:
        """How many of ``keys``, from the last one back, are found before the first MISS."""
        return self._count_found(reversed(keys), ctx)

    def _count_found(self, keys: Iterable[OffloadKey], ctx: ReqContext) -> PrefixLookup:
        num_found, worst = 0, LookupResult.HIT
        for key in keys:
            answer = self.lookup(key, ctx)
            if answer is LookupResult.MISS:
                break
            num_found += 1
            worst = max(worst, answer, key=_CERTAINTY.index)
        return PrefixLookup(num_found, worst)

    @abstractmethod
    def prepare_load(self, keys: Collection[OffloadKey], ctx: ReqContext) -> LoadStoreSpec:
        """Protect loadable chunks from eviction until ``complete_load`` and say where they are.

        A key may be prepared several times; each takes its own ``complete_load``.
        """

    @abstractmethod
    def complete_load(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """End a load. Chunks that could not be read (``success=False``) are forgotten."""

    @abstractmethod
    def prepare_store(self, keys: Collection[OffloadKey], ctx: ReqContext) -> PrepareStoreOutput | None:
        """Make room for the keys not held yet, evicting others; ``None`` if there is no room now.

        Nothing in flight is evicted, nor any of ``keys``. Until ``complete_store`` the chunks answer
        ``HIT_PENDING``.
        """

    def prepare_stores(
        self, offers: Sequence[tuple[Sequence[OffloadKey], ReqContext]]
    ) -> StepStoreOutput | None:
        """``prepare_store`` for all requests of a step, one after another, with one place for all.

        ``complete_store`` is called once for all that was accepted, on behalf of the first request. ``None``,
        the default, asks for one ``prepare_store`` and one job for each request instead.
        """
        return None

    @abstractmethod
    def complete_store(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """The chunks became loadable, or (``success=False``) are dropped."""

    @abstractmethod
    def touch(self, keys: Collection[OffloadKey], ctx: ReqContext) -> None:
        """Mark chunks as recently used, first key last to be evicted; keys not held are ignored."""

    @abstractmethod
    def reset_cache(self) -> None:
        """Forget every chunk; slots in flight come back when their job ends."""

    def on_new_request(self, ctx: ReqContext) -> OffloadPolicy:
        """A request was added. Answers which of its chunks the backend wants to be offered."""
        return OffloadPolicy.CHUNK_LEVEL

    def on_request_finished(self, ctx: ReqContext) -> None:
        """No more stores or loads will be prepared for this request; those under way may still complete."""

    def on_schedule_end(self) -> None:
        """A step was planned: every lookup and load of it has been asked for, and stores that cannot wait.

        Others may be asked for while it runs.
        """

    def has_pending_work(self) -> bool:
        """Whether the loop should go on making (empty) steps for the backend's sake."""
        return False

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Events since the last call."""
        return ()

    def get_stats(self) -> Any:
        """Counters of the backend; plain records."""
        return None

    def leaks(self) -> Sequence[str]:
        """What jobs and lookups still hold, one sentence each; empty when nothing is in flight."""
        return ()

    def shutdown(self) -> None:
        """Free everything."""


class OffloadingWorker(ABC):
    """Worker side of a backend: moves chunks between the cache pytree and its medium.

    A store is done with the pages of the pytree it was given: it reads what they hold at submission, whatever
    is computed from that pytree afterwards. That is what makes freed blocks safe to reuse in the same step.
    """

    @property
    def layout_fingerprint(self) -> str:
        """Names how the bytes of a chunk are arranged; workers with different names share no chunk."""
        return ""

    def warm_up(self, kv_caches: Any, max_blocks: int) -> Any:
        """Compile what jobs of up to ``max_blocks`` blocks a group need; returns the pytree to go on with."""
        return kv_caches

    @abstractmethod
    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        """Start copying device blocks out. Failures become a ``JobResult``, never an exception."""

    @abstractmethod
    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        """Start copying chunks in; returns the pytree to go on with, the one passed in is consumed."""

    def cancel(self, job_ids: Collection[JobId]) -> None:
        """Nobody needs these jobs any more, so what has not begun need not. They are reported all the same.

        Jobs that are not known, or have ended, are passed over. The default lets all of them run.
        """

    @abstractmethod
    def get_finished(self) -> list[JobResult]:
        """Jobs that ended since the last call, in the order they ended."""

    @abstractmethod
    def wait(self, job_ids: Collection[JobId]) -> None:
        """Block until these jobs have ended; they are still reported by ``get_finished``."""

    @abstractmethod
    def shutdown(self) -> None:
        """End all work."""


class OffloadingSpec(ABC):
    """Makes the two halves of a backend (vLLM: ``OffloadingSpec``)."""

    @abstractmethod
    def get_manager(self) -> OffloadingManager:
        """The manager; the same object on every call."""

    @abstractmethod
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """A worker for caches of the layout of ``kv_caches``; keeps no reference to the arrays."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free what both halves share."""
