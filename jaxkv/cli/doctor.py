"""``jaxkv doctor``: says what this installation can do on this machine."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkv.errors import NativeError
from jaxkv.host_pool import HostPool, load_native
from jaxkv.transfer.cuda_device import cuda_device, has_cuda, load_cuda

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the subcommands."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Say which versions and features this installation has, and try the host pool.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print one line per fact; errors are raised with their remedy."""
    facts = {
        "jaxkv": version("jaxkv"),
        "python": platform.python_version(),
        "jax, jaxlib, numpy": f"{jax.__version__}, {version('jaxlib')}, {np.__version__}",
        "jax devices": ", ".join(str(device) for device in jax.devices()),
        "huge pages": _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else "not on this system",
        "copy loop": load_native().copy_loop(),
        "host pool": _try_pool(),
        "cuda extension": _describe_cuda(),
    }
    facts |= {f"transfers of {device}": _describe_paths(device) for device in _cuda_devices()}
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


def _describe_cuda() -> str:
    try:
        built, driver = load_cuda().versions()
    except NativeError as error:
        return f"not there: {error}"
    return f"built with CUDA {_version(built)}, driver {_version(driver) if driver else 'not there'}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda_devices() -> list[jax.Device]:
    return jax.local_devices(backend="gpu") if jax.default_backend() == "gpu" and has_cuda() else []


def _describe_paths(device: jax.Device) -> str:
    cuda = cuda_device(device)
    return f"{cuda.paths} ({cuda.paths_found})"


def _try_pool() -> str:
    num_bytes = 64 << 20
    with HostPool(num_bytes) as pool:
        return f"works, {pool.capacity_bytes / 2**20:.0f} MiB allocated and freed"
