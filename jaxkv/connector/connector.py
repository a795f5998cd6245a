"""The connector a serving loop holds: both halves behind vLLM's method names, and their life cycle."""

from __future__ import annotations

from collections.abc import Sequence, Set
from types import TracebackType
from typing import Any, final

from jaxkv.canonical import Hints
from jaxkv.connector.base import (
    KVCaches,
    KVConnectorBase,
    KVConnectorMetadata,
    KVConnectorOutput,
)
from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.config import OffloadingConfig
from jaxkv.connector.events import EventLog, KVCacheEvent
from jaxkv.connector.metadata import OffloadingConnectorMetadata, OffloadingWorkerMetadata
from jaxkv.connector.metrics import ConnectorStats
from jaxkv.connector.protocols import BlockTables, PartialTailOffload, Request, SchedulerOutput
from jaxkv.connector.retention import Retention
from jaxkv.connector.scheduler import OffloadingScheduler
from jaxkv.connector.sizes import parse_bytes
from jaxkv.connector.tenures import StorePolicy
from jaxkv.connector.worker import OffloadingConnectorWorker
from jaxkv.errors import ConnectorStateError
from jaxkv.keys import BlockId, GroupId
from jaxkv.offload.base import OffloadingSpec
from jaxkv.offload.claims import claim, release
from jaxkv.offload.factory import make_offloading_spec
from jaxkv.offload.options import BackendOptions
from jaxkv.spec import KVCacheConfig


@final
class OffloadingConnector(KVConnectorBase):
    """Offloads KV caches to a backend and brings them back (vLLM: ``OffloadingConnector``).

    ``spec`` is a backend to use instead of the one ``config`` names; the connector takes it over and shuts
    it down. ``hints`` say, by layer name, what the shapes of the caches leave open, see ``LayoutHint``. A
    context manager: leaving it is ``shutdown``. After that every other method raises
    ``ConnectorStateError``.

    Raises ``PoolInUseError`` where the backend or its pool belongs to another connector, ``ConfigError`` for
    options that cannot work.
    """

    def __init__(
        self,
        config: OffloadingConfig,
        kv_cache_config: KVCacheConfig,
        *,
        spec: OffloadingSpec | None = None,
        hints: Hints | None = None,
    ) -> None:
        caches = ChunkedCaches(kv_cache_config, config.blocks_per_chunk)
        Retention.of(caches, config.retention_interval)  # Raises before the backend takes any memory.
        self._spec = spec if spec is not None else _make_spec(config, kv_cache_config, hints or {})
        claim(self._spec)
        events = EventLog(caches, enabled=config.enable_events, self_describing=config.self_describing_events)
        self._open_scheduler: OffloadingScheduler | None = OffloadingScheduler(
            caches,
            self._spec.get_manager(),
            events,
            StorePolicy(config.offload_prompt_only, config.retention_interval),
            num_workers=config.num_workers,
        )
        self._blocks_per_chunk = config.blocks_per_chunk
        self._snapshot_interval_tokens = caches.alignment_tokens
        self._open_worker: OffloadingConnectorWorker | None = None
        self._metadata: OffloadingConnectorMetadata | None = None

    def __enter__(self) -> OffloadingConnector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    @property
    def _scheduler(self) -> OffloadingScheduler:
        if self._open_scheduler is None:
            raise ConnectorStateError("the connector was shut down; make a new one")
        return self._open_scheduler

    @property
    def _worker(self) -> OffloadingConnectorWorker:
        if self._open_scheduler is None:
            raise ConnectorStateError("the connector was shut down; make a new one")
        if self._open_worker is None:
            raise ConnectorStateError("the connector knows no caches; call register_kv_caches first")
        return self._open_worker

    # -- scheduler side ---------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """See ``KVConnectorBase``. Raises ``RequestError`` for an id that is in use."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See ``KVConnectorBase``. Device hit and answer are at most ``num_tokens - 1`` tokens."""
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: BlockTables, num_external_tokens: int
    ) -> None:
        """See ``KVConnectorBase``. Raises ``RequestError`` for tokens that were not promised."""
        self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> OffloadingConnectorMetadata:
        """See ``KVConnectorBase``."""
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """See ``KVConnectorBase``."""
        self._scheduler.update_connector_output(output)

    def request_finished(
        self, request: Request, block_ids: Sequence[BlockId | None]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See ``KVConnectorBase``."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: BlockTables
    ) -> tuple[bool, dict[str, Any] | None]:
        """See ``KVConnectorBase``. The connector's own tables serve; ``block_ids`` is not needed."""
        return self._scheduler.request_finished(request), None

    def register_finished_partial_tail(
        self,
        request: Request,
        block_ids: BlockTables,
        partial_tail_offloads: Sequence[PartialTailOffload],
    ) -> bool:
        """See ``KVConnectorBase``. Raises ``RequestError`` for a boundary between links of the hash chain."""
        self._scheduler.register_finished_partial_tail(request, partial_tail_offloads)
        return False

    def get_snapshot_boundaries(self, request: Request) -> tuple[int, ...]:
        """See ``KVConnectorBase``."""
        return self._scheduler.get_snapshot_boundaries(request)

    @property
    def snapshot_interval_tokens(self) -> int:
        """See ``KVConnectorBase``."""
        return self._snapshot_interval_tokens

    def has_pending_push_work(self) -> bool:
        """See ``KVConnectorBase``."""
        return self._scheduler.has_pending_push_work()

    def has_pending_block_frees(self) -> bool:
        """See ``KVConnectorBase``."""
        return self._scheduler.has_pending_block_frees()

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[GroupId, ...]:
        """See ``KVConnectorBase``."""
        return self._scheduler.get_loaded_kv_cache_group_ids(request)

    def take_events(self) -> Sequence[KVCacheEvent]:
        """See ``KVConnectorBase``. Empty unless the config enables events."""
        return self._scheduler.take_events()

    def get_stats(self) -> ConnectorStats:
        """See ``KVConnectorBase``."""
        return self._scheduler.get_stats()

    def reset_cache(self) -> bool:
        """See ``KVConnectorBase``. Slots of jobs under way come back when those end."""
        self._scheduler.reset_cache()
        return True

    def leaks(self) -> list[str]:
        """What jobs and requests still hold, one sentence each; empty when nothing runs and all is well."""
        return self._scheduler.leaks()

    # -- worker side ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: KVCaches) -> None:
        """See ``KVConnectorBase``. ``CacheMismatchError`` for caches the config does not describe."""
        if self._open_scheduler is not None and self._open_worker is not None:
            raise ConnectorStateError(
                "the caches are registered already; make a new connector for other caches"
            )
        assert self._scheduler is not None
        self._open_worker = OffloadingConnectorWorker(self._spec.get_worker(kv_caches))

    @property
    def layout_fingerprint(self) -> str:
        """See ``KVConnectorBase``."""
        return f"{self._worker.layout_fingerprint} in chunks of {self._blocks_per_chunk}"

    def warm_up(self, kv_caches: KVCaches, max_blocks: int) -> KVCaches:
        """See ``KVConnectorBase``."""
        return self._worker.warm_up(kv_caches, max_blocks)

    def handle_preemptions(self, kv_caches: KVCaches, metadata: KVConnectorMetadata) -> KVCaches:
        """See ``KVConnectorBase``."""
        self._worker.submit_stores(_own(metadata), kv_caches)
        return kv_caches

    def bind_connector_metadata(self, metadata: KVConnectorMetadata) -> None:
        """See ``KVConnectorBase``."""
        self._metadata = _own(metadata)

    def start_load_kv(self, kv_caches: KVCaches) -> KVCaches:
        """See ``KVConnectorBase``. Raises ``ConnectorStateError`` where no metadata is bound."""
        if self._metadata is None:
            raise ConnectorStateError(
                "no metadata is bound; call bind_connector_metadata before start_load_kv"
            )
        return self._worker.submit_loads(self._metadata, kv_caches)

    def wait_for_save(self, kv_caches: KVCaches) -> KVCaches:
        """See ``KVConnectorBase``."""
        self._worker.submit_following(self._scheduler.plan_following(), kv_caches)
        return kv_caches

    def get_finished(self, finished_req_ids: Set[str]) -> tuple[Set[str], Set[str]]:
        """See ``KVConnectorBase``. Failed receives are left for ``get_transfer_results``."""
        return set(), self._worker.take_received()

    def get_transfer_results(self, finished_req_ids: Set[str]) -> KVConnectorOutput:
        """See ``KVConnectorBase``."""
        received, failed = self._worker.take_received(), self._worker.take_failed()
        return KVConnectorOutput(
            finished_recving=received | failed.keys(),
            failed_recving=failed,
            worker_meta=self.build_connector_worker_meta(),
        )

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        """See ``KVConnectorBase``."""
        results = self._worker.take_results()
        return OffloadingWorkerMetadata(results) if results else None

    def clear_connector_metadata(self) -> None:
        """See ``KVConnectorBase``."""
        self._metadata = None

    def shutdown(self) -> None:
        """See ``KVConnectorBase``. Waits for jobs under way."""
        if self._open_scheduler is None:
            return
        if self._open_worker is not None:
            self._open_worker.drain()
            self.update_connector_output(KVConnectorOutput(worker_meta=self.build_connector_worker_meta()))
            self._open_worker.shutdown()
        self._open_scheduler.shutdown()
        self._open_scheduler = self._open_worker = self._metadata = None
        self._spec.shutdown()
        release(self._spec)


def _own(metadata: KVConnectorMetadata) -> OffloadingConnectorMetadata:
    if not isinstance(metadata, OffloadingConnectorMetadata):
        raise ConnectorStateError(f"expected metadata of build_connector_meta, got {type(metadata).__name__}")
    return metadata


def _make_spec(config: OffloadingConfig, kv_cache_config: KVCacheConfig, hints: Hints) -> OffloadingSpec:
    options = BackendOptions(
        kv_cache_config=kv_cache_config,
        hints=hints,
        host_bytes=parse_bytes(config.host_bytes),
        blocks_per_chunk=config.blocks_per_chunk,
        eviction_policy=config.eviction_policy,
        store_threshold=config.store_threshold,
        transfer_backend=config.transfer_backend,
        portable_pages=config.portable_pages,
        data_shard=config.data_shard,
        layerwise_loads=config.layerwise_loads,
        enable_events=config.enable_events,
        extra=config.backend_options,
    )
    return make_offloading_spec(config.backend, options)
