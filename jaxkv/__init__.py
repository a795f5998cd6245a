"""KV cache offloading for JAX serving stacks: hybrid paged caches to host memory and back.

Public are the names exported here, ``jaxkv.views`` (typed arrays in rows of bytes) and the subpackages
``jaxkv.transfer`` (page and pool ops), ``jaxkv.offload`` (backends), ``jaxkv.connector`` (vLLM's connector
API), ``jaxkv.serving`` (a serving loop) and ``jaxkv.testing`` (a test kit). Anything else may change.
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
from jaxkv.fingerprint import cache_fingerprint
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.host_pool import HostPool
from jaxkv.key_parts import CacheKeyParts, MultiModalInput, PromptEmbeddings
from jaxkv.layout import LayoutHint
from jaxkv.pool_handle import PoolHandle
from jaxkv.shared_pool import AttachedPool
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from jaxkv.transfer import BlockTransfer

__all__ = [
    "AttachedPool",
    "BlockIdError",
    "BlockTransfer",
    "CacheKeyParts",
    "CacheMismatchError",
    "CanonicalKVCaches",
    "ChainRoot",
    "ChunkedLocalAttentionSpec",
    "ConfigError",
    "DeletedCacheError",
    "FullAttentionSpec",
    "HashChain",
    "HostPool",
    "JaxKVError",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "LayoutHint",
    "MLAAttentionSpec",
    "MambaSpec",
    "MultiModalInput",
    "NativeError",
    "OffloadingConfig",
    "OffloadingConnector",
    "PoolClosedError",
    "PoolError",
    "PoolForkedError",
    "PoolFull",
    "PoolHandle",
    "PoolInUseError",
    "PromptEmbeddings",
    "RequestError",
    "SlidingWindowSpec",
    "SlotError",
    "WeightsError",
    "cache_fingerprint",
    "canonicalize",
    "parse_bytes",
]
