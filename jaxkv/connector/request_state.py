"""What the connector remembers of each request. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.lookup import Hit
from jaxkv.connector.protocols import BlockTables, Request
from jaxkv.connector.store_plan import StoreView
from jaxkv.keys import BlockId, GroupId, JobId
from jaxkv.offload.base import LoadStoreSpec, ReqContext


@final
@dataclass(slots=True)
class Tenure:
    """One stay of a request on the device, from admission until it finishes or is preempted.

    ``tables`` only ever grow: blocks the loop took back keep their entry, for a store may still read them.
    ``start_tokens`` were on the device at admission, or were loaded; the step in which the request first runs
    may be the one that writes them, so nothing is ``complete`` before that step has ended.
    """

    request: Request
    ctx: ReqContext
    tables: list[list[BlockId | None]]
    start_tokens: int
    next_chunk: list[int]
    running: bool = False
    previous_tokens: int = 0
    complete_tokens: int = 0

    def append_blocks(self, new_blocks: BlockTables) -> None:
        """Blocks were appended to the request's tables; ``new_blocks`` has an entry per group, or none at all."""
        for table, new in zip(self.tables, new_blocks, strict=bool(new_blocks)):
            table.extend(new)

    def advance(self, num_scheduled_tokens: int) -> None:
        """A step that computes this many tokens was planned; it will have ended when the next one is."""
        if self.running:
            self.previous_tokens = self.complete_tokens
            self.complete_tokens += num_scheduled_tokens
        elif num_scheduled_tokens:
            self.running = True
            self.previous_tokens = self.start_tokens
            self.complete_tokens = self.start_tokens + num_scheduled_tokens

    def skip_to_present(self, caches: ChunkedCaches) -> None:
        """What is on the device now will not be stored."""
        present_tokens = max(self.start_tokens, self.complete_tokens)
        self.next_chunk = [
            max(first, present_tokens // caches.tokens_per_chunk(GroupId(group)))
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
    """One request that has not finished, or whose load has not landed."""

    request: Request
    ctx: ReqContext
    device_hit_tokens: int | None = None
    promise: Promise | None = None
    load: JobId | None = None
    tenure: Tenure | None = None
    finished: bool = False
