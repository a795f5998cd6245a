"""The engine: runs steps. Owns the device caches and the order of calls on the connector's worker side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.connector.base import KVConnectorBase, KVConnectorMetadata, KVConnectorOutput
from jaxkv.errors import ConfigError, DeletedCacheError, RequestError
from jaxkv.fingerprint import cache_fingerprint
from jaxkv.hash_chain import ChainRoot, HashChain, TokenIds
from jaxkv.key_parts import CacheKeyParts
from jaxkv.serving.batch import make_sampling_batch, make_step_batch
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import ChunkRules
from jaxkv.serving.config import EngineConfig, EngineStats
from jaxkv.serving.interrupts import hold_interrupts
from jaxkv.serving.model import KVCaches, Model
from jaxkv.serving.no_connector import NoConnector
from jaxkv.serving.programs import StepPrograms, StepShape
from jaxkv.serving.request import Request, RequestOutput, RequestStatus, SamplingParams
from jaxkv.serving.request_checks import check_fits, check_parts, check_prompt
from jaxkv.serving.scheduler import ScheduledChunk, Scheduler, StepPlan
from jaxkv.spec import KVCacheConfig, MambaSpec

_Running = tuple[tuple[ScheduledChunk, ...], Any, Any]
"""What a program serves, its next tokens to come and their logits."""


@final
class LLMEngine:
    """Serves requests of one model over paged caches, with or without a connector.

    An exception in ``step`` (a Ctrl-C included) costs no request: those that held blocks are queued
    again and recompute what the device cache no longer has. The caller may go on with ``step``, or
    ``abort`` what it no longer wants. Outputs of requests that had finished come with the next step. Of
    such a step the connector stores nothing unless its programs had been started, and nothing of lost caches.
    """

    def __init__(
        self,
        model: Model,
        cache_config: KVCacheConfig,
        config: EngineConfig | None = None,
        connector: KVConnectorBase | None = None,
    ) -> None:
        config = EngineConfig() if config is None else config
        self.config = config
        self.cache_config = cache_config
        self.connector = NoConnector() if connector is None else connector
        self.max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
        self.kv_caches: KVCaches = model.init_caches(cache_config)
        self._model = model
        self._cache = CacheManager(cache_config, self.max_model_len)
        self._programs = StepPrograms(model)
        self._ids = itertools.count()
        self._num_steps = 0
        self._is_shut_down = False
        self._outputs: list[RequestOutput] = []
        self._unsent_stores: KVConnectorMetadata | None = None
        self._unsent_loads: KVConnectorMetadata | None = None
        self._untaken_results: KVConnectorOutput | None = None
        self._broke_off = False
        self._lost_caches = False
        self._scheduler = Scheduler(
            self._cache,
            _chunk_rules(config, cache_config, self.connector.snapshot_interval_tokens),
            self.connector,
            max_num_seqs=config.max_num_seqs,
            prefill_budget=config.prefill_budget or config.prefill_shapes[-1],
        )
        self.connector.register_kv_caches(self.kv_caches)
        self._weights_revision = config.weights_revision
        self._chain_root = self._make_chain_root()

    # -- requests ---------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt_ids: TokenIds,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        key_parts: CacheKeyParts | None = None,
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> str:
        """Queue a prompt and answer its id.

        ``key_parts`` say what shapes the request's cached bytes beside its tokens, such as its salt or
        adapter; ``kv_transfer_params`` what it asks of the connector, see ``RequestParams``.

        Raises ``RequestError`` for an empty prompt, unknown tokens, a used id, parts beyond the prompt, or a
        request that the model or the whole cache is too small for.
        """
        params = SamplingParams() if params is None else params
        if request_id is None:
            request_id = next(key for key in map(str, self._ids) if key not in self._scheduler)
        prompt = np.asarray(prompt_ids)
        parts = CacheKeyParts() if key_parts is None else key_parts
        if request_id in self._scheduler:
            raise RequestError(
                f"request id {request_id!r} is in use; choose another or wait until it is over"
            )
        check_prompt(prompt, self._model.vocab_size)
        check_fits(len(prompt), params.max_new_tokens, self.max_model_len, self.cache_config)
        check_parts(parts, len(prompt))
        request = Request(
            request_id,
            prompt,
            params,
            chain=HashChain(self._chain_root, parts),
            kv_transfer_params=kv_transfer_params,
            arrival_s=time.perf_counter(),
        )
        self._scheduler.add(request)
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at any stage; what it had produced, or ``None`` if it is unknown or over."""
        with hold_interrupts():
            request = self._scheduler.finish(request_id, RequestStatus.ABORTED)
        return None if request is None else request.make_output()

    def abort_all(self) -> list[RequestOutput]:
        """Abort every unfinished request."""
        outputs = [self.abort(request_id) for request_id in self._scheduler.unfinished_ids]
        return [output for output in outputs if output is not None]

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has requests to work on."""
        return self._scheduler.has_unfinished

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Serve all prompts to their end and let the connector finish its work; outputs in prompt order.

        If it raises, none of these requests is left behind.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            with hold_interrupts():
                for prompt, prompt_params in zip(prompts, each, strict=True):
                    ids.append(self.add_request(prompt, prompt_params))
            while not outputs.keys() >= set(ids):
                outputs.update((output.request_id, output) for output in self.step())
        except BaseException:
            with hold_interrupts():
                for request_id in ids:
                    with suppress(Exception):  # it is aborted all the same; the first error is raised
                        self.abort(request_id)
            raise
        self.flush()
        return [outputs[request_id] for request_id in ids]

    # -- steps ------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step and answer the requests that finished.

        Raises ``DeletedCacheError`` if a failed program consumed the caches; they are empty then, and
        the next step recomputes.
        """
        self._guarded_step()
        outputs, self._outputs = self._outputs, []
        return outputs

    def flush(self) -> None:
        """Make steps until the connector has nothing left to do. Finished outputs come with the next step."""
        while self._broke_off or self._scheduler.has_loose_ends:
            self._guarded_step()

    def warmup(self) -> None:
        """Compile every program a request can need, those of the connector's transfers included, and run it.

        A first run costs about as much again as a later one; here it computes padding and writes nothing.
        """
        shapes = [StepShape(rows, 1, samples=True) for rows in self.config.decode_rows]
        for tokens in self.config.prefill_shapes:
            shapes += [StepShape(1, tokens, samples=True), StepShape(1, tokens, samples=False)]
        for shape in shapes:
            self._run_shape((), shape)
        self.kv_caches = dict(self.connector.warm_up(self.kv_caches, max(self._cache.max_blocks)))

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes of the device; the connector keeps what it stored."""
        self._cache.clear_cache()

    def set_weights_revision(self, weights_revision: str) -> None:
        """The model's weights changed: nothing that was cached before is hit from now on.

        What the connector stored stays where it is, under the old revision, until it is evicted or the
        weights of that revision are back. Makes steps until the stores under way have ended. Raises
        ``RequestError`` while requests are unfinished, for they would mix both, and ``ConfigError`` for the
        revision there is.
        """
        if self.has_unfinished_requests:
            raise RequestError(
                f"requests {list(self._scheduler.unfinished_ids)} were computed with the old weights; finish "
                "or abort them first"
            )
        if weights_revision == self._weights_revision:
            raise ConfigError(
                f"the weights are {weights_revision!r} already; give changed weights a name of their own"
            )
        self.flush()
        self._cache.clear_cache()
        self._weights_revision = weights_revision
        self._chain_root = self._make_chain_root()

    def _make_chain_root(self) -> ChainRoot:
        config, caches = self.config, self.cache_config
        layout = self.connector.layout_fingerprint
        fingerprint = cache_fingerprint(self._model.name, self._weights_revision, caches, layout)
        return ChainRoot(fingerprint, caches.hash_block_size, config.salt, config.hash_name)

    def shutdown(self) -> None:
        """Abort what runs, let transfers end and shut the connector down, which an error does not prevent.

        Safe to call twice.
        """
        if self._is_shut_down:
            return
        self._is_shut_down = True
        try:
            self.abort_all()
            self.flush()
        finally:
            self.connector.shutdown()

    @property
    def num_compilations(self) -> int:
        """Step programs compiled so far; constant after ``warmup``."""
        return self._programs.num_compilations

    @property
    def stats(self) -> EngineStats:
        """Counters so far."""
        return EngineStats(
            num_steps=self._num_steps,
            num_compilations=self.num_compilations,
            num_preemptions=self._scheduler.num_preemptions,
            device_evictions=self._cache.num_evictions,
        )

    def _guarded_step(self) -> None:
        with hold_interrupts():
            try:
                if self._broke_off:
                    self._catch_up()
                self._broke_off = True  # until it has ended
                self._run_step()
                self._broke_off = False
            except BaseException as error:
                self._recover(error)
                raise

    def _run_step(self) -> None:
        self._num_steps += 1
        plan = self._scheduler.schedule()
        self._unsent_stores = self._unsent_loads = plan.metadata
        self._send_to_worker()
        running = self._dispatch(plan)
        # What is done before the tokens are waited for costs nothing where an accelerator computes meanwhile.
        self.kv_caches = dict(self.connector.wait_for_save(self.kv_caches))
        self._untaken_results = results = self._transfer_results(plan)
        valid = self._scheduler.update(plan, results)
        self._untaken_results = None
        sampled = _read_tokens(running)
        now_s = time.perf_counter()
        for part in valid:
            token, logits = sampled[part.request.request_id]
            self._take_token(part.request, token, logits, now_s)

    def _catch_up(self) -> None:
        """Do what a step that broke off left undone, so that both sides know the same again."""
        self._restart_all()  # again: the first time may have been interrupted
        self._send_to_worker()
        if self._untaken_results is not None:
            self._scheduler.take_results(self._untaken_results)
            self._untaken_results = None
        if self._lost_caches:
            self.connector.reset_cache()  # it may still plan stores of what was lost
            self._lost_caches = False
        self._broke_off = False

    def _send_to_worker(self) -> None:
        """Hand the worker side its part of the step; what breaks off here is sent with the next step."""
        if self._unsent_stores is not None:
            self.kv_caches = dict(self.connector.handle_preemptions(self.kv_caches, self._unsent_stores))
            self._unsent_stores = None
        if self._unsent_loads is not None:
            self.connector.bind_connector_metadata(self._unsent_loads)
            self.kv_caches = dict(self.connector.start_load_kv(self.kv_caches))
            self._unsent_loads = None

    def _dispatch(self, plan: StepPlan) -> Sequence[_Running]:
        """Start the step's programs."""
        running = [self._run_program((part,), part.chunk.shape) for part in plan.prefills]
        if plan.decodes:
            running.append(self._run_program(plan.decodes, 1))
        return running

    def _run_program(self, parts: tuple[ScheduledChunk, ...], tokens: int) -> _Running:
        rows = next(rows for rows in self.config.decode_rows if rows >= len(parts))
        return self._run_shape(parts, StepShape(rows, tokens, samples=parts[0].samples))

    def _run_shape(self, parts: tuple[ScheduledChunk, ...], shape: StepShape) -> _Running:
        self._compile(shape)
        batch = make_step_batch(self._cache, parts, shape)
        if not shape.samples:
            self.kv_caches = self._programs.fill(shape, self.kv_caches, batch)
            return (), (), ()
        sampling = make_sampling_batch(parts, shape.rows)
        new_tokens, logits, self.kv_caches = self._programs.run(shape, self.kv_caches, batch, sampling)
        return parts, new_tokens, logits

    def _transfer_results(self, plan: StepPlan) -> KVConnectorOutput:
        results = self.connector.get_transfer_results(plan.output.finished_req_ids)
        worker_meta = self.connector.build_connector_worker_meta()
        self.connector.clear_connector_metadata()
        return results if worker_meta is None else replace(results, worker_meta=worker_meta)

    def _take_token(
        self, request: Request, token: int, logits: npt.NDArray[np.float32] | None, now_s: float
    ) -> None:
        request.append_token(token, now_s)
        if logits is not None:
            request.logits.append(logits)
        if request.is_complete(frozenset(self.config.eos_token_ids)):
            try:
                self._scheduler.finish(request.request_id, RequestStatus.FINISHED)
            finally:
                self._outputs.append(request.make_output())

    def _compile(self, shape: StepShape) -> None:
        if shape in self._programs:
            return
        batch = make_step_batch(self._cache, (), shape)
        self._programs.compile(shape, self.kv_caches, batch, make_sampling_batch((), shape.rows))

    def _recover(self, error: BaseException) -> None:
        if self._restart_all() and isinstance(error, Exception):
            raise DeletedCacheError(
                "a step failed after its program had consumed the KV caches, so their content is lost; they "
                "are empty again and every request will be recomputed: call step() to go on or abort_all()"
            ) from error

    def _restart_all(self) -> bool:
        """Queue everybody again; whether the caches were lost. May be called again where it broke off."""
        is_lost = _is_lost(self.kv_caches)
        self._scheduler.restart_all(caches_lost=is_lost)
        if is_lost:
            self._lost_caches = True
            self.kv_caches = self._model.init_caches(self.cache_config)
        return is_lost


def _chunk_rules(config: EngineConfig, cache_config: KVCacheConfig, snapshot_interval: int) -> ChunkRules:
    return ChunkRules(
        shapes=config.prefill_shapes,
        block_size=cache_config.alignment_tokens,
        smallest_block=cache_config.hash_block_size,
        stop_at_blocks=any(isinstance(group.spec, MambaSpec) for group in cache_config.groups),
        snapshot_interval=snapshot_interval,
    )


def _is_lost(kv_caches: KVCaches) -> bool:
    leaves = jax.tree.leaves(kv_caches)
    if any(leaf.is_deleted() for leaf in leaves):
        return True
    try:
        for leaf in leaves:
            leaf.block_until_ready()
    except jax.errors.JaxRuntimeError:
        return True
    return False


def _read_tokens(running: Sequence[_Running]) -> Mapping[str, tuple[int, npt.NDArray[np.float32] | None]]:
    """Wait for programs; per sampling request the next token, and its logits where wanted."""
    sampled = {}
    for parts, tokens, logits in running:
        for row, (part, token) in enumerate(zip(parts, np.asarray(tokens).tolist(), strict=False)):
            kept = np.asarray(logits[row]) if part.request.params.return_logits else None
            sampled[part.request.request_id] = (token, kept)
    return sampled
