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
    ``eviction_policy``: ``"lru"`` or the dotted path of a ``CachePolicy``.
    ``offload_prompt_only``: store only chunks that lie inside the prompt.
    ``backend``: ``"host"`` or the dotted path of an ``OffloadingSpec``.
    ``transfer_backend``: how pages are copied, see ``BlockTransfer``.
    ``portable_pages``: keep pages as if no device shared them, so that other meshes can restore them.
    ``data_shard``: which part of block axes split over a mesh this connector serves; one connector for each.
    ``enable_events``: collect events for ``take_events``.
    ``backend_options``: handed to the backend as they are.
    """

    host_bytes: int | str
    blocks_per_chunk: int = 1
    eviction_policy: str = "lru"
    offload_prompt_only: bool = True
    backend: str = "host"
    transfer_backend: str = "auto"
    portable_pages: bool = False
    data_shard: int = 0
    enable_events: bool = False
    backend_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host_bytes", parse_bytes(self.host_bytes))
        if self.blocks_per_chunk < 1:
            raise ConfigError(f"blocks_per_chunk must be at least 1, got {self.blocks_per_chunk}")

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
