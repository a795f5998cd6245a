"""Arrays of random bits and byte-exact comparison. No value ever passes through arithmetic."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

_PACKED_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
"""Bits of the types that XLA stores several to a byte, the first lowest; NumPy gives each a byte."""

_USED_BITS = _PACKED_BITS | {"bool": 1, "float6_e2m3fn": 6, "float6_e3m2fn": 6}
"""Bits that mean anything, of the types that leave a part of a NumPy byte unused."""


def random_caches(shapes: Any, seed: int) -> Any:
    """A pytree of ``jax.Array`` for a pytree of ``jax.ShapeDtypeStruct``, filled with random bits.

    Every bit pattern of the dtype occurs: NaN payloads, subnormals, negative zeros. One struct object that
    stands in several places becomes one array. XLA owns the buffers, so that they can be donated.
    """
    rng = np.random.default_rng(seed)
    made: dict[int, jax.Array] = {}

    def make(struct: jax.ShapeDtypeStruct) -> jax.Array:
        if id(struct) not in made:
            dtype = np.dtype(struct.dtype)
            raw = rng.integers(0, 256, (*struct.shape, dtype.itemsize), dtype=np.uint8)
            raw &= np.uint8((1 << _USED_BITS.get(dtype.name, 8)) - 1)
            made[id(struct)] = jnp.array(raw.view(dtype).reshape(struct.shape), copy=True)
        return made[id(struct)]

    return jax.tree_util.tree_map(make, shapes)


def numpy_copy(kv_caches: Any) -> Any:
    """The pytree with writable NumPy copies; one array in several places stays one.

    Copies on the device first: a NumPy view of a leaf, even one JAX caches, would keep it from being donated.
    """
    made: dict[int, npt.NDArray[Any]] = {}

    def copy(leaf: jax.Array) -> npt.NDArray[Any]:
        if id(leaf) not in made:
            made[id(leaf)] = np.array(jnp.copy(leaf))
        return made[id(leaf)]

    return jax.tree_util.tree_map(copy, kv_caches)


def as_bytes(data: Any) -> npt.NDArray[np.uint8]:
    """The bytes of an array as XLA stores them, row-major, or of anything with the buffer protocol."""
    if isinstance(data, jax.Array):
        data = np.array(jnp.copy(data))
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    bits = _PACKED_BITS.get(data.dtype.name, 8)
    if bits == 8:
        return flat
    lanes = (flat & np.uint8((1 << bits) - 1)).reshape(-1, 8 // bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(lanes << _shifts(bits), axis=1)
    return packed


def from_bytes(data: bytes, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The NumPy array whose ``as_bytes`` are ``data``. Writable."""
    dtype = np.dtype(dtype)
    flat = np.frombuffer(data, np.uint8)
    bits = _PACKED_BITS.get(dtype.name, 8)
    if bits != 8:
        lanes = flat[:, None] >> _shifts(bits) & np.uint8((1 << bits) - 1)
        flat = lanes.reshape(-1)[: math.prod(shape)]
    return flat.copy().view(dtype).reshape(shape)


def _shifts(bits: int) -> npt.NDArray[np.uint8]:
    return np.arange(0, 8, bits, dtype=np.uint8)


def assert_same_bytes(actual: Any, expected: Any, what: str = "data") -> None:
    """Fail with the place of the first differing byte unless both hold the same bytes."""
    left, right = as_bytes(actual), as_bytes(expected)
    if left.size != right.size:
        raise AssertionError(f"{what}: {left.size} bytes, expected {right.size}")
    differing = np.flatnonzero(left != right)
    if differing.size:
        first = int(differing[0])
        raise AssertionError(
            f"{what}: byte {first} of {left.size} is {left[first]:#04x}, expected {right[first]:#04x}; "
            f"{differing.size} bytes differ, the last is {int(differing[-1])}"
        )


def assert_same_caches(actual: Any, expected: Any) -> None:
    """Fail unless two pytrees of arrays (JAX or NumPy) have the same structure, shapes, dtypes and bytes."""
    left, left_tree = jax.tree_util.tree_flatten_with_path(actual)
    right, right_tree = jax.tree_util.tree_flatten_with_path(expected)
    if str(left_tree) != str(right_tree):
        raise AssertionError(f"pytree {left_tree}, expected {right_tree}")
    for (path, leaf), (_, other) in zip(left, right, strict=True):
        name = jax.tree_util.keystr(path)
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            raise AssertionError(f"{name}: {leaf.dtype}{leaf.shape}, expected {other.dtype}{other.shape}")
        assert_same_bytes(leaf, other, name)
