"""One request: its tokens, the hashes that name its prefixes, how far it is, and what is reported of it.

Knows nothing of blocks or queues; those belong to the cache manager and the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, final

import numpy as np
import numpy.typing as npt

from jaxkv.errors import RequestError
from jaxkv.hash_chain import HashChain, TokenIds
from jaxkv.key_parts import CacheKeyParts
from jaxkv.keys import BlockHash


@final
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    ``temperature == 0`` takes the most likely token; above it, token ``i`` of the sequence is drawn with a
    key made of ``seed`` and ``i`` alone, so that batch mates do not change it. ``stop_token_ids`` end the
    request, with the token kept; the engine's end-of-sequence tokens do so too unless ``ignore_eos``.
    ``return_logits`` copies the logits of every generated token to the host. ``skip_reading_prefix_cache``
    computes every token of the prompt, for those who need something of each; what is computed is cached.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    return_logits: bool = False
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise RequestError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed must fit in 32 bits without a sign, got {self.seed}")


class RequestStatus(Enum):
    """Where a request is. Only ``RUNNING`` and ``LOADING`` requests hold blocks."""

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    FINISHED = auto()
    ABORTED = auto()


@final
@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Where the prompt's tokens came from at the first admission, and the time to the first new token.

    The three counts add up to ``prompt_tokens``. ``ttft_s`` is ``None`` if no token was generated.
    """

    prompt_tokens: int
    device_hit_tokens: int
    host_hit_tokens: int
    computed_tokens: int
    ttft_s: float | None


@final
@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request produced. ``logits`` has one (vocab_size,) float32 array per token when asked for."""

    request_id: str
    status: RequestStatus
    output_ids: tuple[int, ...]
    metrics: RequestMetrics
    logits: tuple[npt.NDArray[np.float32], ...] = ()


@final
class Request:
    """A request on its way; satisfies ``jaxkv.connector.protocols.Request``.

    ``chain`` is an empty one, which the request makes its own. ``kv_transfer_params`` are for the connector.
    ``num_computed_tokens`` counts the tokens whose KV or state the device holds. ``device_hit_tokens`` and
    ``host_hit_tokens`` are set by the scheduler at the first admission.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: TokenIds,
        params: SamplingParams,
        *,
        chain: HashChain,
        kv_transfer_params: Mapping[str, Any] | None = None,
        arrival_s: float,
    ) -> None:
        prompt = np.asarray(prompt_ids)
        chain.extend(prompt)
        self.request_id = request_id
        self.params = params
        self.token_ids: list[int] = prompt.tolist()
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.device_hit_tokens: int | None = None
        self.host_hit_tokens = 0
        self.status = RequestStatus.WAITING
        self.arrival_s = arrival_s
        self.first_token_s: float | None = None
        self.logits: list[npt.NDArray[np.float32]] = []
        self.kv_transfer_params = kv_transfer_params
        self.block_hashes: list[BlockHash] = chain.block_hashes
        self._chain = chain

    @property
    def key_parts(self) -> CacheKeyParts:
        """What shapes its cached bytes beside its tokens."""
        return self._chain.parts

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """Whether every token of the prompt is to be computed."""
        return self.params.skip_reading_prefix_cache

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""
        return len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    def append_token(self, token_id: int, now_s: float) -> None:
        """Take in a generated token."""
        self.token_ids.append(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s
        self._chain.extend((token_id,))

    def is_complete(self, eos_token_ids: frozenset[int]) -> bool:
        """Whether the last generated token ends the request."""
        if self.num_tokens - self.num_prompt_tokens >= self.params.max_new_tokens:
            return True
        last = self.token_ids[-1]
        return last in self.params.stop_token_ids or (not self.params.ignore_eos and last in eos_token_ids)

    def note_hit(self, device_tokens: int, host_tokens: int) -> None:
        """Remember where the prompt came from; later admissions, after a preemption, do not count."""
        if self.device_hit_tokens is None:
            self.device_hit_tokens = device_tokens
            self.host_hit_tokens = host_tokens

    def forget_hit(self) -> None:
        """The first admission came to nothing; the next one counts."""
        if self.first_token_s is None:
            self.device_hit_tokens = None
            self.host_hit_tokens = 0

    def make_output(self) -> RequestOutput:
        """The report of this request as it stands."""
        device_hit = self.device_hit_tokens or 0
        ttft_s = None if self.first_token_s is None else self.first_token_s - self.arrival_s
        metrics = RequestMetrics(
            prompt_tokens=self.num_prompt_tokens,
            device_hit_tokens=device_hit,
            host_hit_tokens=self.host_hit_tokens,
            computed_tokens=self.num_prompt_tokens - device_hit - self.host_hit_tokens,
            ttft_s=ttft_s,
        )
        return RequestOutput(
            self.request_id, self.status, tuple(self.output_ids), metrics, tuple(self.logits)
        )
