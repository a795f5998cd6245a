"""The connector's interface: vLLM's ``KVConnectorBase_V1`` for caches that are values.

A serving loop calls the scheduler side while it plans a step and the worker side while it runs one. Worker
calls that read or write caches take the cache pytree; those that write it return the pytree to go on with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, final

from jaxkv.connector.protocols import BlockTables, PartialTailOffload, Request, SchedulerOutput
from jaxkv.keys import BlockId, GroupId

KVCaches = Mapping[str, Any]
"""``{layer_name: leaf | tuple of leaves | dict of leaves}``; a leaf is a ``jax.Array``."""


class KVConnectorMetadata(ABC):
    """What the scheduler side hands to the worker side for one step."""


class KVConnectorWorkerMetadata(ABC):
    """What the worker side reports back after one step."""


@final
@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A load that did not arrive: the blocks that hold nothing usable, and why."""

    blocks: tuple[tuple[GroupId, BlockId], ...]
    error: str


@final
@dataclass(frozen=True, slots=True)
class KVConnectorOutput:
    """Worker results of one step (vLLM: ``KVConnectorOutput``).

    A failed receive is also in ``finished_recving``, so that the request leaves its wait state.
    """

    finished_sending: Set[str] = frozenset()
    finished_recving: Set[str] = frozenset()
    failed_recving: Mapping[str, LoadFailure] = field(default_factory=dict)
    worker_meta: KVConnectorWorkerMetadata | None = None


class KVConnectorBase(ABC):
    """One step, in the order a serving loop calls it; see ``docs/connector.md``."""

    # -- scheduler side ---------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """A request was added. Called before any other call that names it."""

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond ``num_computed_tokens``, and whether they arrive asynchronously.

        ``num_computed_tokens`` is the block-aligned device hit. ``(None, False)`` means ask again next step.
        What is promised stays loadable until the next ``build_connector_meta``, or until the request asks
        again.
        """

    @abstractmethod
    def update_state_after_alloc(
        self, request: Request, blocks: BlockTables, num_external_tokens: int
    ) -> None:
        """Blocks were allocated for an admitted request; ``blocks`` are its complete tables.

        Called on every admission, with ``num_external_tokens == 0`` where nothing is to be loaded, and again
        once an asynchronous load has landed.
        """

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Close the planning of this step. Does not modify ``scheduler_output``."""

    @abstractmethod
    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Take in what the workers completed. Called once for every step that ran, with whatever there is."""

    @abstractmethod
    def request_finished(
        self, request: Request, block_ids: Sequence[BlockId | None]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Single-group form of ``request_finished_all_groups``."""

    @abstractmethod
    def request_finished_all_groups(
        self, request: Request, block_ids: BlockTables
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request ended or was aborted; called once, before its blocks are freed.

        ``(True, ...)`` asks the loop to keep the blocks until the request shows up in ``finished_sending`` or
        ``finished_recving``; jaxkv asks that only while a load into them is under way.
        """

    def register_finished_partial_tail(
        self,
        request: Request,
        block_ids: BlockTables,
        partial_tail_offloads: Sequence[PartialTailOffload],
    ) -> bool:
        """Offer the states at the end of a request that is about to finish, before its blocks are freed.

        With them the incomplete last blocks of all groups can be found again. ``True`` asks the loop to keep
        the blocks until ``finished_sending`` names the request; jaxkv never does: what is offered is read
        before anything can overwrite it.
        """
        return False

    def get_snapshot_boundaries(self, request: Request) -> tuple[int, ...]:
        """Tokens, ascending, at which a step of this prompt should end, to leave a recurrent state there.

        Those of the hits that later requests are expected to have; not in vLLM, whose own scheduler knows
        them. A loop that ends its steps elsewhere loses hits, nothing else. Valid from admission on.
        """
        return ()

    @property
    def snapshot_interval_tokens(self) -> int:
        """Hits end at multiples of this many tokens; long prompts leave states there. 1 means anywhere."""
        return 1

    def has_pending_push_work(self) -> bool:
        """Whether the loop should go on making (empty) steps for the connector's sake."""
        return False

    def has_pending_block_frees(self) -> bool:
        """Whether transfers under way will free blocks, so that waiting beats preempting."""
        return False

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[GroupId, ...]:
        """Groups into which the request's current load writes."""
        return ()

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> Mapping[str, int]:
        """How many of the external tokens each tier supplies; sums to ``num_external_tokens``."""
        return {"host": num_external_tokens} if num_external_tokens else {}

    def take_events(self) -> Iterable[Any]:
        """Events since the last call: what became loadable and what was removed."""
        return ()

    def get_stats(self) -> Any:
        """Counters with reasons, per group; plain records."""
        return None

    def reset_cache(self) -> bool:
        """Forget everything stored. ``False`` if it could not be done."""
        return True

    # -- worker side ------------------------------------------------------------------------------------

    @abstractmethod
    def register_kv_caches(self, kv_caches: KVCaches) -> None:
        """Learn the cache layout. Called once, before the first step; keeps no reference to the arrays."""

    @property
    def layout_fingerprint(self) -> str:
        """Names what else a key must tell apart: how bytes are arranged in chunks. See ``cache_fingerprint``.

        Known once the caches are registered.
        """
        return ""

    def warm_up(self, kv_caches: KVCaches, max_blocks: int) -> KVCaches:
        """Prepare for requests of up to ``max_blocks`` blocks, so that no step waits for a compilation.

        Moves nothing. The arrays passed in are consumed.
        """
        return kv_caches

    @abstractmethod
    def handle_preemptions(self, kv_caches: KVCaches, metadata: KVConnectorMetadata) -> KVCaches:
        """Submit the stores that must come before anything of the step. Always first."""

    @abstractmethod
    def bind_connector_metadata(self, metadata: KVConnectorMetadata) -> None:
        """Make ``metadata`` that of the current step."""

    @abstractmethod
    def start_load_kv(self, kv_caches: KVCaches) -> KVCaches:
        """Submit the loads of the step. The arrays passed in are consumed."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Layer-wise hook of vLLM. Nothing is left to do: a program waits for the caches it is given.

        A step that is one program waits for all of them. One dispatched layer by layer waits for those of one
        layer at a time, which arrive one after another with the option ``layerwise_loads``.
        """

    def save_kv_layer(self, layer_name: str, kv_layer: Any) -> None:
        """Layer-wise hook of vLLM; stores are submitted per step, so nothing is left to do."""

    @abstractmethod
    def wait_for_save(self, kv_caches: KVCaches) -> KVCaches:
        """Plan and submit the other stores of the step, from the caches it returned.

        Best called once the step was dispatched, and before its tokens are waited for. These stores are of
        blocks that the step leaves alone. Where this is not called, they are planned and submitted with later
        steps. What the step itself computes is stored by the next.
        """

    @abstractmethod
    def get_finished(self, finished_req_ids: Set[str]) -> tuple[Set[str], Set[str]]:
        """Requests whose sends and whose receives ended since the last call."""

    @abstractmethod
    def get_transfer_results(self, finished_req_ids: Set[str]) -> KVConnectorOutput:
        """Like ``get_finished``, with failed receives and the worker's report."""

    @abstractmethod
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Job completions since the last call, or ``None``."""

    @abstractmethod
    def clear_connector_metadata(self) -> None:
        """Forget the metadata of the step."""

    @abstractmethod
    def shutdown(self) -> None:
        """End all work and free what the connector owns. Safe to call twice."""
