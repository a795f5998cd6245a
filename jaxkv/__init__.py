"""KV cache offloading for JAX serving stacks: hybrid paged caches to host memory and back.

Public are the names exported here and the subpackages ``jaxkv.transfer`` (page and pool ops),
``jaxkv.offload`` (backends), ``jaxkv.connector`` (vLLM's connector API), ``jaxkv.serving`` (a serving loop)
and ``jaxkv.testing`` (a test kit). Anything else may change.
"""

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.connector import OffloadingConfig, OffloadingConnector, parse_bytes
from jaxkv.errors import (
    BlockIdError,
    CacheMismatchError,
    ConfigError,
    DeletedCacheError,
    JaxKVError,
    NativeError,
    PoolClosedError,
    PoolError,
    PoolForkedError,
    PoolFull,
    PoolInUseError,
    RequestError,
    SlotError,
    WeightsError,
)
from jaxkv.host_pool import HostPool
from jaxkv.layout import LayoutHint
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from jaxkv.transfer import BlockTransfer

__all__ = [
    "BlockIdError",
    "BlockTransfer",
    "CacheMismatchError",
    "CanonicalKVCaches",
    "ConfigError",
    "DeletedCacheError",
    "FullAttentionSpec",
    "HostPool",
    "JaxKVError",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "LayoutHint",
    "MambaSpec",
    "NativeError",
    "OffloadingConfig",
    "OffloadingConnector",
    "PoolClosedError",
    "PoolError",
    "PoolForkedError",
    "PoolFull",
    "PoolInUseError",
    "RequestError",
    "SlidingWindowSpec",
    "SlotError",
    "WeightsError",
    "canonicalize",
    "parse_bytes",
]
