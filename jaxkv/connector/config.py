"""The options of the offloading connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, final

from jaxkv.connector.sizes import parse_bytes
from jaxkv.errors import ConfigError


@final
@dataclass(frozen=True, slots=True)
class OffloadingConfig:
    """Options of ``OffloadingConnector``; names as in vLLM where it has them.

    ``host_bytes``: size of the host pool, an int or ``"64MiB"``.
    ``blocks_per_chunk``: blocks that are stored, found and evicted together.
    ``eviction_policy``: ``"lru"``, ``"arc"`` or the dotted path of a ``CachePolicy``.
    ``store_threshold``: how often a chunk must be asked for before it is stored; 0 and 1 store at once.
    ``offload_prompt_only``: store only chunks that lie inside the prompt.
    ``retention_interval``: which boundaries keep their recurrent state and their tail of a window. ``None``:
    all of them. 0: the ends of prompts and requests, and where prompts branch. n: also every n tokens.
    ``num_workers``: how many worker sides report each transfer before it counts as done.
    ``backend``: ``"host"`` or the dotted path of an ``OffloadingSpec``.
    ``transfer_backend``: how pages are copied, see ``BlockTransfer``.
    ``portable_pages``: keep pages as if no device shared them, so that other meshes can restore them.
    ``data_shard``: which part of block axes split over a mesh this connector serves; one connector for each.
    ``layerwise_loads``: load layer after layer, for models that are dispatched layer by layer.
    ``enable_events``: collect events for ``take_events``.
    ``self_describing_events``: events of stored chunks carry parent, tokens and extra keys as well, which the
    connector remembers for every chunk the backend holds.
    ``backend_options``: handed to the backend as they are.
    """

    host_bytes: int | str
    blocks_per_chunk: int = 1
    eviction_policy: str = "lru"
    store_threshold: int = 0
    offload_prompt_only: bool = True
    retention_interval: int | None = None
    num_workers: int = 1
    backend: str = "host"
    transfer_backend: str = "auto"
    portable_pages: bool = False
    data_shard: int = 0
    layerwise_loads: bool = False
    enable_events: bool = False
    self_describing_events: bool = False
    backend_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host_bytes", parse_bytes(self.host_bytes))
        _require_at_least(1, "blocks_per_chunk", self.blocks_per_chunk)
        _require_at_least(1, "num_workers", self.num_workers)
        _require_at_least(0, "store_threshold", self.store_threshold)
        if self.retention_interval is not None:
            _require_at_least(0, "retention_interval", self.retention_interval)
        if self.self_describing_events and not self.enable_events:
            raise ConfigError("self_describing_events needs enable_events; set both")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> OffloadingConfig:
        """A config from plain options. An unknown one is a ``ConfigError`` that lists the known ones."""
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"unknown connector options {unknown}; known are {known}")
        if "host_bytes" not in options:
            raise ConfigError("the connector needs host_bytes, the size of its host pool, such as '1GiB'")
        return cls(**options)


def _require_at_least(least: int, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
