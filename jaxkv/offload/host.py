"""The host memory backend: one pool, the manager that divides it and the worker that fills it."""

from __future__ import annotations

import logging
from typing import Any, final

from jaxkv.canonical import canonicalize
from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.host_pool import HostPool
from jaxkv.offload.base import OffloadingSpec
from jaxkv.offload.claims import claim, release
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.offload.host_worker import HostOffloadingWorker
from jaxkv.offload.options import BackendOptions
from jaxkv.offload.policies import find_policy
from jaxkv.records import RECORD_ALIGNMENT
from jaxkv.transfer import BlockTransfer

_log = logging.getLogger(__name__)


@final
class HostOffloadingSpec(OffloadingSpec):
    """Chunks in host memory (vLLM: ``CPUOffloadingSpec``).

    ``pool`` is a pool to use instead of one of ``options.host_bytes``; it stays open at the end. Raises
    ``ConfigError`` where the pool cannot hold one chunk of every group, ``PoolInUseError`` where another
    backend has the pool.
    """

    def __init__(self, options: BackendOptions, *, pool: HostPool | None = None) -> None:
        if options.extra:
            raise ConfigError(f"the host backend has no further options, got {sorted(options.extra)}")
        policy = find_policy(options.eviction_policy)
        self._options = options
        self._record_bytes = [
            -(-group.page_size_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
            for group in options.kv_cache_config.groups
        ]
        self._owns_pool = pool is None
        self._pool = HostPool(options.host_bytes) if pool is None else pool
        claim(self._pool)
        try:
            slot_bytes = [size * options.blocks_per_chunk for size in self._record_bytes]
            self._manager = HostOffloadingManager(
                self._pool,
                slot_bytes,
                policy,
                store_threshold=options.store_threshold,
                enable_events=options.enable_events,
            )
        except BaseException:
            self._close_pool()
            raise

    @property
    def pool(self) -> HostPool:
        """The pool the chunks are in."""
        return self._pool

    def get_manager(self) -> HostOffloadingManager:
        """See ``OffloadingSpec``."""
        return self._manager

    def get_worker(self, kv_caches: Any) -> HostOffloadingWorker:
        """See ``OffloadingSpec``. ``CacheMismatchError`` for caches the config does not describe."""
        options = self._options
        canonical = canonicalize(
            kv_caches, options.kv_cache_config, options.hints, portable_pages=options.portable_pages
        )
        found = [record.record_bytes for record in canonical.records]
        if found != self._record_bytes:
            raise CacheMismatchError(
                f"the groups of the caches keep {found} bytes per block, the specs say {self._record_bytes}; "
                "set page_size_bytes of the specs to what a block really stores"
            )
        for layer_name, reason in canonical.per_shard_layers.items():
            _log.warning("pages of layer %r are not portable: %s", layer_name, reason)
        transfer = BlockTransfer(
            canonical,
            self._pool,
            blocks_per_chunk=options.blocks_per_chunk,
            backend=options.transfer_backend,
            data_shard=options.data_shard,
            layerwise=options.layerwise_loads,
        )
        return HostOffloadingWorker(transfer, options.blocks_per_chunk)

    def shutdown(self) -> None:
        """See ``OffloadingSpec``. A pool that was handed in stays open."""
        self._manager.shutdown()
        self._close_pool()

    def _close_pool(self) -> None:
        release(self._pool)
        if self._owns_pool:
            self._pool.close()
