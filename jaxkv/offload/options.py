"""What a backend is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from jaxkv.canonical import Hints
from jaxkv.spec import KVCacheConfig


@final
@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What every backend is made from.

    ``hints`` and ``portable_pages`` are for ``canonicalize``, ``transfer_backend``, ``data_shard`` and
    ``layerwise_loads`` for ``BlockTransfer``; ``store_threshold`` is how often a chunk must have been asked
    for before it is stored; ``extra`` is the backend's own business.
    """

    kv_cache_config: KVCacheConfig
    host_bytes: int
    hints: Hints = field(default_factory=dict)
    blocks_per_chunk: int = 1
    eviction_policy: str = "lru"
    store_threshold: int = 0
    transfer_backend: str = "auto"
    portable_pages: bool = False
    data_shard: int = 0
    layerwise_loads: bool = False
    enable_events: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
