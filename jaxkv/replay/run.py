"""Replays a trace under one configuration and reports what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxkv.connector import ConnectorStats, OffloadingConfig
from jaxkv.errors import ConfigError
from jaxkv.replay.backend import INSTANT_BACKEND
from jaxkv.replay.loop import ReplayLoop
from jaxkv.replay.models import find_model_shape, kind_of
from jaxkv.replay.optimum import HostAccesses, capacity_in_pieces
from jaxkv.replay.trace import TraceRequest
from jaxkv.serving.sizing import divide_device_bytes
from jaxkv.spec import KVCacheConfig


@final
@dataclass(frozen=True, slots=True)
class Deployment:
    """What serves the trace: a model's caches, the device cache, the host pool and how it is run."""

    model: str = "gemma-like"
    block_size: int = 16
    device_bytes: int = 24 << 30
    host_bytes: int = 64 << 30
    eviction_policy: str = "lru"
    retention_interval: int | None = None
    prefill_tokens: int = 2048
    blocks_per_chunk: int = 1
    offload_prompt_only: bool = False

    def cache_config(self, max_tokens: int) -> KVCacheConfig:
        """Groups with as many blocks as the device cache holds; ``ConfigError`` if a request does not fit."""
        groups = find_model_shape(self.model).make_groups(self.block_size)
        return divide_device_bytes(groups, self.device_bytes, max_tokens, (self.prefill_tokens,))

    def offloading(self) -> OffloadingConfig:
        """The connector's options."""
        return OffloadingConfig(
            self.host_bytes,
            blocks_per_chunk=self.blocks_per_chunk,
            eviction_policy=self.eviction_policy,
            offload_prompt_only=self.offload_prompt_only,
            retention_interval=self.retention_interval,
            backend=INSTANT_BACKEND,
        )


@final
@dataclass(frozen=True, slots=True)
class GroupResult:
    """What went to and from the host in one group of layers."""

    kind: str
    stored_chunks: int
    stored_bytes: int
    loaded_chunks: int
    loaded_bytes: int
    evicted_chunks: int

    @property
    def resident_chunks(self) -> int:
        """Chunks in the pool at the end."""
        return self.stored_chunks - self.evicted_chunks


@final
@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Prompt tokens by origin, traffic and evictions over the whole trace.

    ``servable_prompts`` of ``distinct_prompts`` could at the end be served by the host alone up to their
    last block boundary. ``optimal_host_tokens`` is the bound of ``jaxkv.replay.optimum`` for these device
    hits, and ``reusable_tokens`` what a host without limit would have supplied.
    """

    deployment: Deployment
    num_requests: int
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    optimal_host_tokens: int
    reusable_tokens: int
    device_evictions: int
    groups: tuple[GroupResult, ...]
    distinct_prompts: int
    servable_prompts: int

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt_tokens - self.device_tokens - self.host_tokens

    @property
    def hit_rate(self) -> float:
        """The part of all prompt tokens that was not computed."""
        return (self.device_tokens + self.host_tokens) / self.prompt_tokens

    @property
    def optimal_hit_rate(self) -> float:
        """The bound on ``hit_rate`` with these device hits."""
        return (self.device_tokens + self.optimal_host_tokens) / self.prompt_tokens

    @property
    def highest_hit_rate(self) -> float:
        """``hit_rate`` with a host without limit."""
        return (self.device_tokens + self.reusable_tokens) / self.prompt_tokens


def replay(trace: Sequence[TraceRequest], deployment: Deployment) -> ReplayResult:
    """Serve the requests of a trace in order.

    Raises ``ConfigError`` for a trace without requests, or a device or a pool that is too small for one.
    """
    if not trace:
        raise ConfigError("there is nothing to replay; give a trace of at least one request")
    max_tokens = max(request.num_tokens for request in trace)
    config = deployment.cache_config(max_tokens)
    accesses = HostAccesses()
    with ReplayLoop(
        config, deployment.offloading(), max_tokens=max_tokens, prefill_tokens=deployment.prefill_tokens
    ) as loop:
        served = []
        for request in trace:
            served.append(loop.serve(request))
            _note_accesses(accesses, loop, request, served[-1].device_tokens)
        stats, device_evictions = loop.stats, loop.device_evictions
        distinct = {request.prompt: request for request in trace}.values()
        servable = sum(map(loop.is_servable, distinct))
    piece_tokens = config.hash_block_size
    return ReplayResult(
        deployment=deployment,
        num_requests=len(trace),
        prompt_tokens=sum(one.prompt_tokens for one in served),
        device_tokens=sum(one.device_tokens for one in served),
        host_tokens=sum(one.host_tokens for one in served),
        optimal_host_tokens=piece_tokens
        * accesses.optimal_hits(capacity_in_pieces(config, deployment.host_bytes)),
        reusable_tokens=piece_tokens * accesses.optimal_hits(None),
        device_evictions=device_evictions,
        groups=_group_results(config, stats),
        distinct_prompts=len(distinct),
        servable_prompts=servable,
    )


def _note_accesses(
    accesses: HostAccesses, loop: ReplayLoop, request: TraceRequest, device_tokens: int
) -> None:
    piece_tokens = loop.cache_config.hash_block_size
    on_device = request.num_tokens - 1
    if loop.offload_prompt_only:
        on_device = min(on_device, request.prompt_tokens)
    pieces = loop.hashes(request)[: on_device // piece_tokens]
    accesses.add(pieces, range(device_tokens // piece_tokens, request.prompt_tokens // piece_tokens))


def _group_results(config: KVCacheConfig, stats: ConnectorStats) -> tuple[GroupResult, ...]:
    return tuple(
        GroupResult(
            kind=kind_of(group.spec),
            stored_chunks=counts.stored_chunks,
            stored_bytes=counts.stored_bytes,
            loaded_chunks=counts.loaded_chunks,
            loaded_bytes=counts.loaded_bytes,
            evicted_chunks=counts.evicted_chunks,
        )
        for group, counts in zip(config.groups, stats.groups, strict=True)
    )
