"""Makes the compiled handlers known to XLA, once, when the first op is traced."""

from __future__ import annotations

import threading
from typing import Any

import jax

from jaxkv.host_pool import load_native
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer.cuda_device import has_cuda, load_cuda, pin_pool

GATHER_PAGES = "jaxkv_gather_pages"
SCATTER_PAGES = "jaxkv_scatter_pages"
OFFLOAD = "jaxkv_offload"
READ_BLOCKS = "jaxkv_read_blocks"
RESTORE = "jaxkv_restore"
WRITE_BLOCKS = "jaxkv_write_blocks"

_lock = threading.Lock()
_registered = False


def register_targets() -> None:
    """Register all FFI targets for the platforms JAX has here. Later calls do nothing.

    Their backends are made first: a handler XLA does not accept must fail alone, not take a backend with it.
    Raises ``NativeError`` if the compiled extension does not load.
    """
    global _registered  # noqa: PLW0603
    with _lock:
        if _registered:
            return
        native = load_native()
        if has_platform("cpu"):
            _register(native.ffi_targets(), "cpu")
        if has_cuda() and has_platform("cuda"):
            _register(load_cuda().ffi_targets(), "CUDA")
        _registered = True


def prepare_pool(pool: AnyPool) -> None:
    """Let GPUs reach the memory of ``pool``, if JAX has any here that we have handlers for."""
    register_targets()
    if has_cuda() and has_platform("cuda"):
        pin_pool(pool)


def has_platform(platform: str) -> bool:
    """Whether JAX has devices of this platform here, by the names that ``jax.devices`` takes."""
    try:
        return bool(jax.devices(platform))
    except RuntimeError:  # JAX was not installed for it, or told not to use it.
        return False


def _register(targets: dict[str, Any], platform: str) -> None:
    for name, handler in targets.items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)
