"""What a backend is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig


@final
@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What every backend is made from.

    ``hints`` are for ``canonicalize``; ``extra`` is the backend's own business.
    """

    kv_cache_config: KVCacheConfig
    host_bytes: int
    hints: Mapping[str, LayoutHint] = field(default_factory=dict)
    blocks_per_chunk: int = 1
    eviction_policy: str = "lru"
    transfer_backend: str = "auto"
    enable_events: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
