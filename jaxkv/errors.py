"""Every exception jaxkv raises on purpose. Each message names the offending value and the remedy."""


class JaxKVError(Exception):
    """Base of all jaxkv errors, so that a serving loop can catch them as one."""


class ConfigError(JaxKVError, ValueError):
    """A spec, size or option that cannot work, found before anything was allocated."""


class CacheMismatchError(JaxKVError, ValueError):
    """The cache pytree is not what its ``KVCacheConfig`` describes."""


class DeletedCacheError(CacheMismatchError):
    """A cache array was already donated or deleted when it was handed over."""


class BlockIdError(JaxKVError, IndexError):
    """A block id outside its group, or repeated where a repeat would be ambiguous."""


class PoolError(JaxKVError):
    """Base of what a host pool refuses."""


class PoolFull(PoolError):
    """Not enough free slots; nothing was reserved."""


class PoolClosedError(PoolError):
    """The pool was closed before this use."""


class PoolForkedError(PoolError):
    """The pool belongs to the parent of this process and cannot be used after ``fork``."""


class PoolInUseError(PoolError):
    """The pool still holds slots, or another connector already owns it."""


class SlotError(PoolError, ValueError):
    """A slot that was freed, belongs to another pool or has another size."""


class NativeError(JaxKVError, RuntimeError):
    """The compiled extension is missing or was built against a newer jaxlib."""


class RequestError(JaxKVError, ValueError):
    """A request that can never be served as it is."""


class WeightsError(JaxKVError):
    """Model weights that are missing, truncated, altered or of an unsupported kind."""


class ConnectorStateError(JaxKVError, RuntimeError):
    """A connector was used before its caches were registered, registered twice, or used after shutdown."""
