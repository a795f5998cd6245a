"""Makes traces of multi-turn conversations. Pure: the same parameters give the same trace everywhere.

How a trace comes about:

* **System prompts.** A few, of lognormal length. A conversation begins with one, drawn with Zipf weights, so
  that some are in very many prompts and most are rare.
* **Documents.** Many more, of lognormal length. Some conversations (``document_share``) are about one, again
  drawn with Zipf weights: this is what a host pool keeps for later.
* **Turns.** A conversation has a geometric number of turns. A turn's prompt is everything said so far,
  replies included, and a new message; lengths of messages and replies are lognormal.
* **Branches.** With probability ``branch_share`` a turn does not follow the last one, but an earlier turn of
  its conversation: an edited message, a second try, an agent's other idea. It goes on from there.
* **Arrivals.** Conversations start as a Poisson process. A turn follows the reply before it after an
  exponential thinking time, so that conversations interleave.

No request is longer than ``max_tokens``, reply included: a system prompt takes at most an eighth of them, a
document six eighths, a message and a reply half an eighth each, and a conversation ends before the turn that
would not fit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count, islice
from typing import final

from jaxkv.errors import ConfigError
from jaxkv.replay.trace import Segment, TraceRequest


@final
@dataclass(frozen=True, slots=True)
class Length:
    """A lognormal number of tokens: its median, and the sigma of its logarithm."""

    median: int
    sigma: float

    def __post_init__(self) -> None:
        if self.median < 1 or self.sigma < 0:
            raise ConfigError(f"a length needs a median of at least 1 and no negative sigma, got {self}")

    def draw(self, rng: random.Random, largest: int) -> int:
        """A length within 1 and ``largest``."""
        return max(1, min(largest, round(self.median * math.exp(rng.gauss(0.0, self.sigma)))))


@final
@dataclass(frozen=True, slots=True)
class TraceParams:
    """What a trace is like; see the module for what each part does. Rates are per second."""

    num_requests: int = 400
    seed: int = 0
    max_tokens: int = 131_072
    num_system_prompts: int = 8
    num_documents: int = 64
    zipf_exponent: float = 1.0
    document_share: float = 0.5
    branch_share: float = 0.15
    mean_turns: float = 4.0
    system_tokens: Length = field(default_factory=lambda: Length(1200, 0.8))
    document_tokens: Length = field(default_factory=lambda: Length(16_000, 1.0))
    message_tokens: Length = field(default_factory=lambda: Length(120, 1.2))
    output_tokens: Length = field(default_factory=lambda: Length(300, 0.8))
    conversations_per_s: float = 0.5
    thinking_s: float = 60.0
    output_tokens_per_s: float = 50.0

    def __post_init__(self) -> None:
        counts = (self.num_requests, self.num_system_prompts, self.num_documents)
        rates = (self.conversations_per_s, self.thinking_s, self.output_tokens_per_s)
        shares = (self.document_share, self.branch_share)
        if min(counts) < 1 or self.mean_turns < 1 or self.seed < 0:
            raise ConfigError(
                f"a trace needs counts and turns of at least 1 and a seed of at least 0: {self}"
            )
        if self.max_tokens < 16:
            raise ConfigError(
                f"conversations do not fit {self.max_tokens} tokens; give max_tokens at least 16"
            )
        if min(rates) <= 0 or not all(0 <= share <= 1 for share in shares) or self.zipf_exponent < 0:
            raise ConfigError(f"rates must be positive, shares within 0 and 1, the exponent positive: {self}")


def generate_trace(params: TraceParams) -> list[TraceRequest]:
    """``params.num_requests`` requests by arrival: those of the conversations that started first."""
    world = _World(params)
    requests: list[TraceRequest] = []
    start_s = 0.0
    while len(requests) < params.num_requests:
        start_s += world.rng.expovariate(params.conversations_per_s)
        requests.extend(world.converse(start_s))
    return sorted(
        islice(requests, params.num_requests), key=lambda request: (request.arrival_s, request.name)
    )


@final
class _World:
    """What conversations share: prompts and documents, and the numbers of streams."""

    def __init__(self, params: TraceParams) -> None:
        self.rng = random.Random(params.seed)
        self._params = params
        self._streams = count()
        self._conversations = count()
        self._eighth = params.max_tokens // 8
        self._system_prompts = [
            self._segment(params.system_tokens, self._eighth) for _ in range(params.num_system_prompts)
        ]
        self._documents = [
            self._segment(params.document_tokens, 6 * self._eighth) for _ in range(params.num_documents)
        ]

    def converse(self, start_s: float) -> Iterator[TraceRequest]:
        """The turns of one conversation; the prompt and reply of each are what the next ones build on."""
        params, rng = self._params, self.rng
        name, now_s = next(self._conversations), start_s
        told = [self._opening()]
        for turn in count():
            basis = rng.choice(told) if rng.random() < params.branch_share else told[-1]
            prompt = (*basis, self._segment(params.message_tokens, self._eighth // 2))
            reply = self._segment(params.output_tokens, self._eighth // 2)
            request = TraceRequest(f"c{name}.{turn}", now_s, prompt, reply)
            if request.num_tokens > params.max_tokens:
                return
            yield request
            told.append((*prompt, request.output))
            now_s += request.output_tokens / params.output_tokens_per_s
            now_s += rng.expovariate(1 / params.thinking_s)
            if rng.random() * params.mean_turns < 1:
                return

    def _opening(self) -> tuple[Segment, ...]:
        opening = (self._pick(self._system_prompts),)
        if self.rng.random() < self._params.document_share:
            return (*opening, self._pick(self._documents))
        return opening

    def _pick(self, segments: list[Segment]) -> Segment:
        """By Zipf's law: the k-th is drawn in proportion to ``k ** -zipf_exponent``."""
        weights = (rank**-self._params.zipf_exponent for rank in range(1, len(segments) + 1))
        (picked,) = self.rng.choices(segments, cum_weights=list(accumulate(weights)))
        return picked

    def _segment(self, length: Length, largest: int) -> Segment:
        return Segment(next(self._streams), length.draw(self.rng, largest))
