"""What the connector asks of a serving loop: small shapes any JAX loop can satisfy without importing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol, final

from jaxkv.keys import BlockHash, BlockId, GroupId

BlockTables = Sequence[Sequence[BlockId | None]]
"""Per group, the blocks of one request from its first token on; ``None`` where it holds none."""

PartialTailOffload = tuple[GroupId, BlockId, int]
"""A block that holds the recurrent state of a group at a boundary (tokens), though no table says so."""


class Request(Protocol):
    """A request as the connector sees it (vLLM: ``vllm.v1.request.Request``).

    Further attributes are read where a request has them: ``kv_transfer_params`` and
    ``skip_reading_prefix_cache``, see ``RequestParams``; for events that describe themselves its tokens, as
    ``all_token_ids`` or ``token_ids``, and ``key_parts``, a ``CacheKeyParts``.
    """

    @property
    def request_id(self) -> str:
        """Unique among the requests that have not finished."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV or state the device holds."""

    @property
    def block_hashes(self) -> Sequence[BlockHash]:
        """One chained hash for each full hash block of the known tokens; append-only."""


@final
@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one engine step will do (vLLM: ``SchedulerOutput``).

    ``new_block_ids`` are the blocks appended to a request's tables since ``update_state_after_alloc`` or the
    last step. Requests that finished or were preempted since the last step are named once.
    ``boundary_state_offloads`` hand over states that the last step left in blocks outside a request's tables:
    what a model emits on its way through a long step, or a copy made before a state is written again.
    """

    num_scheduled_tokens: Mapping[str, int] = field(default_factory=dict)
    new_block_ids: Mapping[str, BlockTables] = field(default_factory=dict)
    finished_req_ids: Set[str] = frozenset()
    preempted_req_ids: Set[str] = frozenset()
    boundary_state_offloads: Mapping[str, Sequence[PartialTailOffload]] = field(default_factory=dict)
