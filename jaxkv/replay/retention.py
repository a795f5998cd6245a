"""What retention is worth: how many distinct prompts a pool of one size can serve, with it and without.

Prompts come in families: all of a family begin with the same tokens and then each goes on with its own, as
questions about one document do. They are served one after another, more of them than the pool can hold. Then
the pool alone is asked, for each prompt, how much of it can be served. A prompt counts if that is everything
up to its last block boundary. A device cache that holds little more than one prompt keeps out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import final

from jaxkv.connector import OffloadingConfig
from jaxkv.errors import ConfigError
from jaxkv.replay.backend import INSTANT_BACKEND
from jaxkv.replay.loop import ReplayLoop
from jaxkv.replay.models import CacheGroups
from jaxkv.replay.trace import Segment, TraceRequest
from jaxkv.serving.sizing import blocks_to_serve
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec


@final
@dataclass(frozen=True, slots=True)
class Families:
    """Prompts of ``prompt_tokens`` tokens; ``branches`` of them share their first ``shared_tokens``."""

    num_families: int
    branches: int
    prompt_tokens: int
    shared_tokens: int
    output_tokens: int = 16

    def __post_init__(self) -> None:
        if min(self.num_families, self.branches, self.shared_tokens, self.output_tokens) < 1:
            raise ConfigError(f"families need counts and lengths of at least 1, got {self}")
        if self.shared_tokens >= self.prompt_tokens:
            raise ConfigError(f"prompts of {self.prompt_tokens} tokens cannot share {self.shared_tokens}")

    def prompts(self) -> list[list[TraceRequest]]:
        """The requests, family after family."""
        streams = count()
        families = []
        for family in range(self.num_families):
            shared = Segment(next(streams), self.shared_tokens)
            families.append([self._branch(shared, f"f{family}.{i}", streams) for i in range(self.branches)])
        return families

    def _branch(self, shared: Segment, name: str, streams: count[int]) -> TraceRequest:
        own = Segment(next(streams), self.prompt_tokens - self.shared_tokens)
        return TraceRequest(name, 0.0, (shared, own), Segment(next(streams), self.output_tokens))


@final
@dataclass(frozen=True, slots=True)
class RetentionResult:
    """What a pool could serve in the end: prompts to their last block, and of how many families.

    ``branch_points`` are families whose shared tokens can be served to a prompt that goes on in a new way.
    """

    retention_interval: int | None
    num_prompts: int
    servable_prompts: int
    servable_families: int
    branch_points: int
    stored_bytes: int


def serve_families(
    groups: CacheGroups,
    families: Families,
    host_bytes: int,
    retention_interval: int | None,
    *,
    device_prompts: int = 1,
) -> RetentionResult:
    """Serve all prompts of ``families`` and ask the pool what it holds.

    The device cache has blocks for ``device_prompts`` prompts; with few of them it hardly serves any.
    """
    max_tokens = families.prompt_tokens + families.output_tokens
    prefill_tokens = max(1, families.prompt_tokens // 16)
    config = _small_device(groups, max_tokens, prefill_tokens, device_prompts)
    offloading = OffloadingConfig(
        host_bytes,
        offload_prompt_only=False,
        retention_interval=retention_interval,
        backend=INSTANT_BACKEND,
    )
    requests = families.prompts()
    with ReplayLoop(config, offloading, max_tokens=max_tokens, prefill_tokens=prefill_tokens) as loop:
        for family in requests:
            for request in family:
                loop.serve(request)
        servable = [[loop.is_servable(request) for request in family] for family in requests]
        new = [_new_branch(index, family[0]) for index, family in enumerate(requests)]
        return RetentionResult(
            retention_interval=retention_interval,
            num_prompts=families.num_families * families.branches,
            servable_prompts=sum(map(sum, servable)),
            servable_families=sum(map(any, servable)),
            branch_points=sum(map(loop.is_servable, new)),
            stored_bytes=loop.stats.stored_bytes,
        )


def _small_device(
    groups: CacheGroups, max_tokens: int, prefill_tokens: int, device_prompts: int
) -> KVCacheConfig:
    """So many times the blocks that one request needs."""
    return KVCacheConfig(
        tuple(
            KVCacheGroupSpec(names, spec, device_prompts * blocks_to_serve(spec, max_tokens, prefill_tokens))
            for names, spec in groups
        )
    )


def _new_branch(family: int, request: TraceRequest) -> TraceRequest:
    """The shared tokens of a family and one token that nobody asked yet."""
    nobody = Segment(2**32 + family, 1)
    return TraceRequest(f"new{family}", 0.0, (request.prompt[0], nobody), nobody)
