"""What a request asks of the connector: how much to load and store, and from where. Decides nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from jaxkv.connector.protocols import Request
from jaxkv.errors import RequestError
from jaxkv.offload.base import OffloadPolicy, ReqContext

_MEDIUM_OF_VLLM = {"cpu": "host"}


@final
@dataclass(frozen=True, slots=True)
class RequestParams:
    """A request's wishes, read once; names as in vLLM where it has them.

    ``max_load_tokens``: how many tokens may be loaded behind the device hit. ``max_offload_tokens``: how many
    tokens, counted from the first, may be stored. ``load_tiers``: media chunks may come from. ``None`` sets
    no limit.
    ``offload_policy``: ``REQUEST_LEVEL`` offers the backend every chunk of the request.
    ``skip_reading``: compute every token, as prompt log-probabilities need; what is computed is stored.
    ``kv_transfer_params``: all parameters as they came, for backends that read their own.
    """

    max_load_tokens: int | None = None
    max_offload_tokens: int | None = None
    load_tiers: frozenset[str] | None = None
    offload_policy: OffloadPolicy = OffloadPolicy.CHUNK_LEVEL
    skip_reading: bool = False
    kv_transfer_params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> RequestParams:
        """The parameters in ``request.kv_transfer_params`` and ``request.skip_reading_prefix_cache``.

        A request that lacks these attributes asks for nothing. Parameters this connector does not know are
        left to others. Raises ``RequestError`` for a known one with a value that means nothing.
        """
        params = getattr(request, "kv_transfer_params", None)
        if params is None:
            params = {}
        if not isinstance(params, Mapping):
            raise RequestError(f"kv_transfer_params must be a mapping or None, got {params!r}")
        return cls(
            max_load_tokens=_read_tokens(params, "max_load_tokens"),
            max_offload_tokens=_read_tokens(params, "max_offload_tokens"),
            load_tiers=_read_tiers(params.get("kv_load_tiers")),
            offload_policy=_read_policy(params.get("offload_policy")),
            skip_reading=bool(getattr(request, "skip_reading_prefix_cache", False)),
            kv_transfer_params=params,
        )

    def load_limit(self, device_tokens: int, num_tokens: int) -> int:
        """The highest boundary a hit may reach, out of ``num_tokens``, behind a hit of ``device_tokens``."""
        if self.skip_reading or (self.load_tiers is not None and not self.load_tiers):
            return min(device_tokens, num_tokens)
        if self.max_load_tokens is None:
            return num_tokens
        return min(device_tokens + self.max_load_tokens, num_tokens)

    def store_limit(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` tokens may be stored."""
        return num_tokens if self.max_offload_tokens is None else min(num_tokens, self.max_offload_tokens)

    def policy(self, of_backend: OffloadPolicy) -> OffloadPolicy:
        """Which chunks to offer: all of them where the request or the backend wants that."""
        wanted = (self.offload_policy, of_backend)
        return OffloadPolicy.REQUEST_LEVEL if OffloadPolicy.REQUEST_LEVEL in wanted else of_backend

    def context(self, req_id: str) -> ReqContext:
        """What a backend is told of the request."""
        return ReqContext(req_id, self.kv_transfer_params, self.load_tiers)


def _read_tokens(params: Mapping[str, Any], name: str) -> int | None:
    value = params.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} must be a whole number of tokens, 0 or more, got {value!r}")
    return value


def _read_tiers(value: Any) -> frozenset[str] | None:
    """Media of vLLM's list of matchers; a matcher that names no medium allows all."""
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise RequestError(f"kv_load_tiers must be a list such as [{{'medium': 'host'}}], got {value!r}")
    media = [_read_medium(entry) for entry in value]
    return None if None in media else frozenset(medium for medium in media if medium is not None)


def _read_medium(entry: Any) -> str | None:
    name = entry.get("medium") if isinstance(entry, Mapping) else entry
    if isinstance(entry, Mapping) and entry.keys() - {"medium"}:
        raise RequestError(f"tiers are chosen by medium alone, got {dict(entry)!r}; leave the rest out")
    if isinstance(entry, Mapping) and name is None:
        return None
    if not isinstance(name, str) or not name:
        raise RequestError(f"a load tier is named by its medium, such as 'host', got {name!r}")
    return _MEDIUM_OF_VLLM.get(name.lower(), name.lower())


def _read_policy(value: Any) -> OffloadPolicy:
    if value is None:
        return OffloadPolicy.CHUNK_LEVEL
    try:
        return OffloadPolicy(value)
    except ValueError:
        known = [policy.value for policy in OffloadPolicy]
        raise RequestError(f"offload_policy must be one of {known}, got {value!r}") from None
