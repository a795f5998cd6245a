"""What the connector remembers of each request. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from jaxkv.connector.lookup import Hit
from jaxkv.connector.protocols import BlockTables, Request
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.retention import Boundaries
from jaxkv.keys import BlockId, GroupId, JobId
from jaxkv.offload.base import LoadStoreSpec, OffloadPolicy, ReqContext


@final
@dataclass(frozen=True, slots=True)
class Tail:
    """A boundary inside chunks, and the groups of which the chunk that it cuts is still to be stored."""

    end_tokens: int
    groups: tuple[GroupId, ...]


@final
@dataclass(slots=True, eq=False)
class Tenure:
    """One stay of a request on the device, from admission until it finishes or is preempted.

    ``tables`` only ever grow: blocks the loop took back keep their entry, for a store may still read them.
    ``complete_tokens`` are on the device once the last step has ended (at first those the device held already
    and those that are loaded), ``previous_tokens`` were when it began. A request is not ``running`` before
    its first step has ended: until then another request may still be about to write what the device cache
    lends it. One that ``has_ended`` is planned for once more. ``begun_tokens`` may have been written: more
    than are complete where a step was not reported, or it is not known how much of it counts.

    Of what to store: ``limit_tokens`` is how far (``None``: all). ``first_chunk`` and ``next_chunk`` have an
    entry per group: where storing may begin, and where it goes on. ``boundaries`` are where later requests
    may start from; ``tail`` is what is missing of one more that cuts chunks. ``handed_states`` are blocks
    outside the tables that hold the state of a group at a boundary. There is nothing more to store until
    ``due_tokens`` are complete; ``None``: there never is. ``unconfirmed_tokens`` belong to a step that ran,
    but the loop has not said yet how many of them were accepted. What ``was_refused`` waits for room.
    """

    request: Request
    ctx: ReqContext
    tables: list[list[BlockId | None]]
    complete_tokens: int
    previous_tokens: int
    begun_tokens: int
    first_chunk: list[int]
    next_chunk: list[int]
    limit_tokens: int | None
    boundaries: Boundaries
    tail: Tail | None = None
    handed_states: dict[tuple[GroupId, int], BlockId] = field(default_factory=dict)
    due_tokens: int | None = 0
    unconfirmed_tokens: int = 0
    was_refused: bool = False
    running: bool = False
    has_ended: bool = False

    def add_blocks(self, new_blocks: BlockTables) -> None:
        """Blocks that were appended to the tables: an entry per group."""
        for table, new in zip(self.tables, new_blocks, strict=True):
            table.extend(new)

    def end_step(self, num_scheduled_tokens: int) -> bool:
        """A step of so many tokens ran. Answers whether there is something to store now."""
        self.running = True
        self.previous_tokens = self.begun_tokens
        is_known = self.begun_tokens == self.complete_tokens
        self.begun_tokens = reached = self.begun_tokens + num_scheduled_tokens
        if self.request.num_computed_tokens == reached:  # nearly always: no draft was rejected
            self.complete_tokens = reached
            return self.due_tokens is not None and reached >= self.due_tokens
        self.unconfirmed_tokens = num_scheduled_tokens
        # Behind a step that was not reported, what the request counts by now may be of that one alone.
        return is_known and self.confirm()

    def lose_step(self, num_scheduled_tokens: int) -> None:
        """A step of so many tokens was planned and not reported: it may have run, or broken off anywhere."""
        self.previous_tokens = self.begun_tokens
        self.begun_tokens += num_scheduled_tokens

    def confirm(self) -> bool:
        """Count the tokens of the last step as computed, as soon as the request says how many of them are.

        Drafted tokens that were rejected are not. Answers whether there is something to store now.
        """
        # Called for every running request of every step: min() and max() would cost more than the rest.
        complete, computed = self.complete_tokens, self.request.num_computed_tokens
        if self.unconfirmed_tokens and computed > complete:
            if max(self.begun_tokens, computed) > complete + self.unconfirmed_tokens:
                # A step before it was not reported: where that one ended, and what the next gave back and
                # overwrote, is not known.
                self.previous_tokens = computed
            self.complete_tokens = self.begun_tokens = complete = computed
            self.unconfirmed_tokens = 0
        return self.due_tokens is not None and complete >= self.due_tokens


@final
@dataclass(frozen=True, slots=True)
class Promise:
    """A hit that was answered: its chunks are pinned, and ``spec`` says where they are."""

    hit: Hit
    spec: LoadStoreSpec


@final
@dataclass(slots=True, eq=False)
class RequestState:
    """One request that has not finished, or whose load has not landed.

    ``branch_tokens`` is where it leaves a prefix that others stored. ``deferred_since_s`` is when, on the
    monotonic clock, it was first asked to wait for its answer, ``retry_until_s`` when it stops waiting for a
    backend that answers RETRY.
    """

    request: Request
    ctx: ReqContext
    params: RequestParams
    policy: OffloadPolicy
    device_hit_tokens: int | None = None
    branch_tokens: int | None = None
    promise: Promise | None = None
    load: JobId | None = None
    tenure: Tenure | None = None
    finished: bool = False
    deferred_since_s: float | None = None
    retry_until_s: float | None = None
