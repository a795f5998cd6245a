"""How a stay on the device begins: what is there already, and how much of what follows is to be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.protocols import BlockTables
from jaxkv.connector.request_state import RequestState, Tail, Tenure
from jaxkv.connector.retention import Boundaries, Retention, last_link, prompt_boundaries
from jaxkv.keys import GroupId
from jaxkv.offload.base import OffloadPolicy


@final
@dataclass(frozen=True, slots=True)
class StorePolicy:
    """What is worth storing: see ``OffloadingConfig``."""

    offload_prompt_only: bool = True
    retention_interval: int | None = None


@final
class Tenures:
    """Makes tenures by one policy. Raises ``ConfigError`` for a retention interval the caches cannot have."""

    def __init__(self, caches: ChunkedCaches, policy: StorePolicy) -> None:
        self._caches = caches
        self._prompt_only = policy.offload_prompt_only
        self._retention = Retention.of(caches, policy.retention_interval)

    def begin(self, state: RequestState, blocks: BlockTables, num_external_tokens: int) -> Tenure:
        """The tenure of a request that was admitted, or whose load has landed since it was."""
        request, before = state.request, state.tenure
        if state.device_hit_tokens is not None:
            start = state.device_hit_tokens + num_external_tokens
        else:
            start = before.complete_tokens if before is not None else request.num_computed_tokens
        first_chunk = self._first_chunk(state, start, num_external_tokens)
        # A loop may find all tokens on the device; it computes the last one again, for its logits.
        complete = min(start, request.num_tokens - 1)
        points = prompt_boundaries(self._caches, request.num_prompt_tokens, state.branch_tokens)
        return Tenure(
            request,
            state.ctx,
            tables=[list(table) for table in blocks],
            complete_tokens=complete,
            previous_tokens=complete,
            begun_tokens=complete,
            first_chunk=first_chunk,
            next_chunk=list(first_chunk),
            limit_tokens=self._limit_tokens(state),
            boundaries=Boundaries(self._retention, points),
            tail=self._tail(state, start),
        )

    def skip(self, tenure: Tenure, num_running_tokens: int) -> None:
        """Nothing of what is computed, or is being computed by a step of so many tokens, will be stored.

        Nor will chunks that begin with it. Changes ``tenure``.
        """
        num_tokens = tenure.begun_tokens + num_running_tokens
        tenure.next_chunk = [-(-num_tokens // group.tokens_per_chunk) for group in self._caches.hit_groups]
        tenure.first_chunk = list(tenure.next_chunk)
        tenure.handed_states, tenure.tail = {}, None

    def _first_chunk(self, state: RequestState, start: int, num_external_tokens: int) -> list[int]:
        """Where storing begins: behind what was loaded, which the backend holds, unless it wants all."""
        if num_external_tokens and state.policy is OffloadPolicy.CHUNK_LEVEL:
            return self._chunks_before(start)
        if state.tenure is not None and state.device_hit_tokens is None:
            return state.tenure.first_chunk
        return [0] * self._caches.num_groups

    def _limit_tokens(self, state: RequestState) -> int | None:
        if self._prompt_only:
            return state.params.store_limit(state.request.num_prompt_tokens)
        return state.params.max_offload_tokens

    def ask_for_tail(self, tenure: Tenure, end_tokens: int) -> None:
        """A tail that ends there is to be stored, unless one is that reaches further. Changes ``tenure``."""
        if tenure.tail is None or tenure.tail.end_tokens < end_tokens:
            tenure.tail = Tail(end_tokens, self._caches.groups_cut_at(end_tokens))

    def _tail(self, state: RequestState, start: int) -> Tail | None:
        """Where the prompt's last link ends, if that cuts chunks, and this request computes and stores it."""
        end, limit = last_link(self._caches, state.request.num_prompt_tokens), self._limit_tokens(state)
        groups = self._caches.groups_cut_at(end)
        is_stored = limit is None or self._caches.tail_named_at_tokens(end) <= limit
        return Tail(end, groups) if groups and start < end and is_stored else None

    def _chunks_before(self, num_tokens: int) -> list[int]:
        return [
            num_tokens // self._caches.tokens_per_chunk(GroupId(group))
            for group in range(self._caches.num_groups)
        ]
