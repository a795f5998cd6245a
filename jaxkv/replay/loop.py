"""Serves requests of a trace one after another, without a model: only what is decided happens.

The connector, the host manager behind it and the device cache are the real ones. Requests do not overlap:
each is served to its end, and its stores have landed, before the next one arrives. So the outcome depends
on the order of arrival alone, and what the device holds of other requests is what they left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

from jaxkv.connector import (
    ConnectorStats,
    KVConnectorOutput,
    OffloadingConfig,
    OffloadingConnector,
    SchedulerOutput,
)
from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash
from jaxkv.replay.trace import TraceRequest, chain_hashes
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk, ChunkRules, chunk_choices
from jaxkv.serving.request import Request
from jaxkv.spec import KVCacheConfig, MambaSpec

_ROOT = BlockHash(b"jaxkv.replay")


@final
@dataclass(frozen=True, slots=True)
class Served:
    """Where the tokens of one prompt came from; what came from neither was computed."""

    prompt_tokens: int
    device_tokens: int
    host_tokens: int


@final
@dataclass(slots=True)
class _Request:
    """What connector and device cache look at in a request."""

    request_id: str
    num_prompt_tokens: int
    num_tokens: int
    block_hashes: Sequence[BlockHash]
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False


@final
class ReplayLoop:
    """A serving loop for one request at a time. ``cache_config`` says how many blocks the device has.

    ``max_tokens`` is the longest request; at most ``prefill_tokens`` are computed in a step. A context
    manager: leaving it shuts the connector down.
    """

    def __init__(
        self,
        cache_config: KVCacheConfig,
        offloading: OffloadingConfig,
        *,
        max_tokens: int,
        prefill_tokens: int,
    ) -> None:
        self.connector = OffloadingConnector(offloading, cache_config)
        self.connector.register_kv_caches({})
        self._cache = CacheManager(cache_config, max_tokens)
        self.cache_config = cache_config
        self.offload_prompt_only = offloading.offload_prompt_only
        self._alignment = cache_config.alignment_tokens * offloading.blocks_per_chunk
        self._rules = ChunkRules(
            shapes=(prefill_tokens,),
            block_size=cache_config.alignment_tokens,
            smallest_block=cache_config.hash_block_size,
            stop_at_blocks=any(isinstance(group.spec, MambaSpec) for group in cache_config.groups),
            snapshot_interval=self.connector.snapshot_interval_tokens,
        )

    def __enter__(self) -> ReplayLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.connector.shutdown()

    @property
    def device_evictions(self) -> int:
        """Device blocks of a cached prefix that were taken for something else."""
        return self._cache.num_evictions

    @property
    def stats(self) -> ConnectorStats:
        """The connector's counters."""
        return self.connector.get_stats()

    def hashes(self, request: TraceRequest) -> list[BlockHash]:
        """Block hashes of prompt and output."""
        return chain_hashes((*request.prompt, request.output), self.cache_config.hash_block_size, _ROOT)

    def serve(self, trace_request: TraceRequest) -> Served:
        """Admit, load, compute and finish one request."""
        request = self._make_request(trace_request)
        self.connector.on_new_request(request)
        served = self._admit(request)
        self._compute(request, request.num_prompt_tokens)
        self._generate(request, trace_request.num_tokens)
        self._finish(request)
        return served

    def servable_tokens(self, trace_request: TraceRequest) -> int:
        """Prompt tokens the host alone could serve now. The request is not admitted."""
        request = self._make_request(trace_request)
        self.connector.on_new_request(request)
        found, _ = self.connector.get_num_new_matched_tokens(request, 0)
        assert found is not None, f"{request.request_id} is told to wait though nothing is in flight"
        self.connector.request_finished_all_groups(request, [[] for _ in self.cache_config.groups])
        self._settle(request)
        return found

    def is_servable(self, trace_request: TraceRequest) -> bool:
        """Whether the host alone could serve a prompt now, up to the last chunk boundary inside it.

        One that is shorter than a chunk is servable if any of it is.
        """
        last = trace_request.prompt_tokens - 1
        return self.servable_tokens(trace_request) >= max(1, last - last % self._alignment)

    def _make_request(self, trace_request: TraceRequest) -> _Request:
        prompt = trace_request.prompt_tokens
        return _Request(trace_request.name, prompt, prompt, self.hashes(trace_request))

    def _admit(self, request: _Request) -> Served:
        """Take blocks, and load what the host has; the request is ready to be computed behind that."""
        device_hit = self._cache.find_hit(_as_serving(request))
        external, _ = self.connector.get_num_new_matched_tokens(request, device_hit)
        assert external is not None, f"{request.request_id} is told to wait though nothing is in flight"
        boundary = device_hit + external
        start = min(boundary, request.num_tokens - 1)
        if not self._cache.admit(
            _as_serving(request), device_hit, boundary, self._chunk(request, start, request.num_tokens)
        ):
            raise _too_small(request)
        request.num_computed_tokens = device_hit
        tables = self._cache.all_tables(_as_serving(request))
        self.connector.update_state_after_alloc(request, tables, external)
        if external:
            self._load(request, start)
        request.num_computed_tokens = start
        return Served(request.num_prompt_tokens, device_hit, start - device_hit)

    def _load(self, request: _Request, boundary: int) -> None:
        results = self._run_step(SchedulerOutput())
        self.connector.update_connector_output(results)
        assert results.finished_recving == {request.request_id}, f"{request.request_id} received nothing"
        self._cache.register(_as_serving(request), boundary)
        request.num_computed_tokens = boundary
        tables = self._cache.loaded_tables(_as_serving(request), boundary)
        self.connector.update_state_after_alloc(request, tables, 0)

    def _compute(self, request: _Request, end: int) -> None:
        """Compute the known tokens up to ``end``, in as many steps as it takes."""
        while request.num_computed_tokens < end:
            chunk = self._chunk(request, request.num_computed_tokens, end)
            if not self._cache.extend(_as_serving(request), chunk):
                raise _too_small(request)
            tables = self._cache.new_tables(_as_serving(request))
            new_block_ids = {} if tables is None else {request.request_id: tables}
            results = self._run_step(SchedulerOutput({request.request_id: chunk.num_new}, new_block_ids))
            self._cache.register(_as_serving(request), chunk.start)
            self._cache.register(_as_serving(request), chunk.end)
            request.num_computed_tokens = chunk.end
            self.connector.update_connector_output(results)

    def _generate(self, request: _Request, num_tokens: int) -> None:
        """Compute what is generated, except the last token: nothing follows that would need it.

        Many tokens are computed in one step, but one ends wherever a recurrent state may be kept, as it would
        if they came one by one.
        """
        while request.num_computed_tokens < num_tokens - 1:
            done = request.num_computed_tokens
            stop = done - done % self._rules.block_size + self._rules.block_size
            end = min(num_tokens - 1, stop if self._rules.stop_at_blocks else num_tokens)
            request.num_tokens = end + 1
            self._compute(request, end)

    def _finish(self, request: _Request) -> None:
        self.connector.request_finished_all_groups(request, self._cache.all_tables(_as_serving(request)))
        self._cache.release(_as_serving(request))
        self._settle(request)

    def _settle(self, request: _Request) -> None:
        """Empty steps until the connector has nothing left to do."""
        output = SchedulerOutput(finished_req_ids={request.request_id})
        self.connector.update_connector_output(self._run_step(output))
        while self.connector.has_pending_push_work():
            self.connector.update_connector_output(self._run_step(SchedulerOutput()))

    def _run_step(self, output: SchedulerOutput) -> KVConnectorOutput:
        """What a step asks of both halves of the connector, up to the results of its transfers."""
        metadata = self.connector.build_connector_meta(output)
        self.connector.handle_preemptions({}, metadata)
        self.connector.bind_connector_metadata(metadata)
        self.connector.start_load_kv({})
        self.connector.wait_for_save({})
        results = self.connector.get_transfer_results(output.finished_req_ids)
        self.connector.clear_connector_metadata()
        return results

    def _chunk(self, request: _Request, start: int, num_tokens: int) -> Chunk:
        stops = self.connector.get_snapshot_boundaries(request) if start < request.num_prompt_tokens else ()
        return next(chunk_choices(self._rules, start, num_tokens, self._rules.shapes[0], stops))


def _as_serving(request: _Request) -> Request:
    """The device cache reads a request's id, hashes and number of tokens, and those are here."""
    return cast(Request, request)


def _too_small(request: _Request) -> ConfigError:
    return ConfigError(
        f"the device cache has no room for {request.request_id} of {request.num_tokens} tokens; "
        "give it more bytes"
    )
