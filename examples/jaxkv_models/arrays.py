"""Host memory for weights that JAX takes over without a copy, so that weights are resident once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.errors import WeightsError

HostTensor = npt.NDArray[np.float32]

_ALIGNMENT = 64
"""Bytes; the CPU backend of XLA copies arrays that are aligned less."""
SLICE_ELEMENTS = 1 << 22
"""Elements converted to float32 at a time, so that the copies on the way stay small."""


def aligned_empty(shape: tuple[int, ...]) -> HostTensor:
    """Uninitialised float32 memory that the CPU backend uses as it is."""
    num_bytes = math.prod(shape) * 4
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(np.float32).reshape(shape)


def load_tensors(names: Iterable[str], read: Callable[[str], HostTensor]) -> dict[str, jax.Array]:
    """Every tensor of ``names``, read and handed to JAX before the next one is touched."""
    return {name: jax.device_put(read(name), may_alias=True) for name in names}


def check_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ``WeightsError`` when tensor ``what`` has another shape than the config implies."""
    if found != expected:
        raise WeightsError(
            f"tensor {what} has shape {found}, but its config implies {expected}; "
            "use weights and config of the same model"
        )
