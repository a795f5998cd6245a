"""What the connector remembers of each request. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.lookup import Hit
from jaxkv.connector.protocols import BlockTables, Request
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.store_plan import StoreView
from jaxkv.keys import BlockId, GroupId, JobId
from jaxkv.offload.base import LoadStoreSpec, ReqContext


@final
@dataclass(slots=True)
class Tenure:
    """One stay of a request on the device, from admission until it finishes or is preempted.

    ``tables`` only ever grow: blocks the loop took back keep their entry, for a store may still read them.
    ``complete_tokens`` are on the device once the last step has ended; at first they are those the device
    held already and those that are loaded. A request is not ``running`` before its first step has ended:
    until then another request may still be about to write what the device cache lends it.
    ``scheduled_tokens`` belong to a step that was planned and has not ended.
    """

    request: Request
    ctx: ReqContext
    params: RequestParams
    tables: list[list[BlockId | None]]
    complete_tokens: int
    previous_tokens: int
    next_chunk: list[int]
    scheduled_tokens: int = 0
    running: bool = False

    def begin_step(self, new_blocks: BlockTables, num_scheduled_tokens: int) -> None:
        """A step was planned. ``new_blocks``, appended to the tables, has an entry per group, or none at all.

        What an earlier step left uncommitted was never computed: that step broke off.
        """
        for table, new in zip(self.tables, new_blocks, strict=bool(new_blocks)):
            table.extend(new)
        self.previous_tokens = self.complete_tokens
        self.scheduled_tokens = num_scheduled_tokens

    def end_step(self) -> None:
        """The step ran."""
        self.running = self.running or self.scheduled_tokens > 0
        self.complete_tokens += self.scheduled_tokens
        self.scheduled_tokens = 0

    def skip_to_present(self, caches: ChunkedCaches) -> None:
        """What is on the device now will not be stored."""
        self.next_chunk = [
            max(first, self.complete_tokens // caches.tokens_per_chunk(GroupId(group)))
            for group, first in enumerate(self.next_chunk)
        ]

    def store_view(self, limit_tokens: int) -> StoreView:
        """The tenure as store planning sees it."""
        return StoreView(
            tables=self.tables,
            block_hashes=self.request.block_hashes,
            next_chunk=self.next_chunk,
            previous_tokens=self.previous_tokens,
            complete_tokens=self.complete_tokens,
            limit_tokens=limit_tokens,
        )


@final
@dataclass(frozen=True, slots=True)
class Promise:
    """A hit that was answered: its chunks are pinned, and ``spec`` says where they are."""

    hit: Hit
    spec: LoadStoreSpec


@final
@dataclass(slots=True)
class RequestState:
    """One request that has not finished, or whose load has not landed.

    ``retry_until_s`` is when, on the monotonic clock, it stops waiting for a backend that answers RETRY.
    """

    request: Request
    ctx: ReqContext
    params: RequestParams
    device_hit_tokens: int | None = None
    promise: Promise | None = None
    load: JobId | None = None
    tenure: Tenure | None = None
    finished: bool = False
    retry_until_s: float | None = None
