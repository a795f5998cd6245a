"""Makes the compiled handlers known to XLA, once, when the first op is traced."""

from __future__ import annotations

import threading

import jax

from jaxkv.host_pool import load_native

GATHER_PAGES = "jaxkv_gather_pages"
SCATTER_PAGES = "jaxkv_scatter_pages"
OFFLOAD = "jaxkv_offload"
READ_BLOCKS = "jaxkv_read_blocks"
RESTORE = "jaxkv_restore"
WRITE_BLOCKS = "jaxkv_write_blocks"

_lock = threading.Lock()
_registered = False


def register_targets() -> None:
    """Register all FFI targets for the CPU platform. Later calls do nothing.

    The backend is made first: a handler XLA does not accept must fail alone, not take the backend with it.
    Raises ``NativeError`` if the compiled extension does not load.
    """
    global _registered  # noqa: PLW0603
    with _lock:
        if _registered:
            return
        targets = load_native().ffi_targets()
        jax.devices("cpu")
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        _registered = True
