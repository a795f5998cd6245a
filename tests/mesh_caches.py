"""Caches of a layout case on a mesh, and what JAX should do with their buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.keys import GroupId
from jaxkv.testing import LayoutCase, PageSlice, Sizes, layout_cases, numpy_copy

SIZES = Sizes(num_blocks=6, tokens=4, heads=8, head_size=4)
"""Heads for up to eight devices."""

MESH_CASES = {case.name: case for case in layout_cases(SIZES)}


@dataclass(frozen=True)
class MeshPlan:
    """Axes of a mesh and which of them split blocks (``data``) and heads (``heads``); others hold copies."""

    axes: tuple[tuple[str, int], ...]
    data: tuple[str, ...] = ("data",)
    heads: tuple[str, ...] = ("tensor",)
    is_shuffled: bool = False

    def __str__(self) -> str:
        shape = "_".join(f"{name}{size}" for name, size in self.axes)
        return shape + "_shuffled" * self.is_shuffled

    @property
    def num_data_shards(self) -> int:
        return self._count(self.data)

    @property
    def num_devices(self) -> int:
        """Devices that share a block, holders of the same part counted once."""
        return self._count(self.heads)

    def _count(self, names: tuple[str, ...]) -> int:
        return math.prod(size for name, size in self.axes if name in names)

    def make(self) -> Mesh:
        shape = tuple(size for _, size in self.axes)
        devices = np.array(jax.devices()[: math.prod(shape)])
        if self.is_shuffled:
            devices = np.random.default_rng(0).permutation(devices)
        return Mesh(devices.reshape(shape), tuple(name for name, _ in self.axes))

    def sharding(self, page: PageSlice, shape: tuple[int, ...]) -> NamedSharding:
        known = {name for name, _ in self.axes}
        spec: list[Any] = [None] * len(shape)
        spec[page.data_axis] = tuple(name for name in self.data if name in known) or None
        if page.split_axis is not None and shape[page.split_axis] % self.num_devices == 0:
            spec[page.split_axis] = tuple(name for name in self.heads if name in known) or None
        return NamedSharding(self.make(), PartitionSpec(*spec))


TENSOR_2 = MeshPlan((("tensor", 2),))
TENSOR_4 = MeshPlan((("tensor", 4),))
TENSOR_8 = MeshPlan((("tensor", 8),))
DATA_2 = MeshPlan((("data", 2),))
DATA_2_TENSOR_2 = MeshPlan((("data", 2), ("tensor", 2)))
DATA_2_TENSOR_4 = MeshPlan((("data", 2), ("tensor", 4)))
COPIES = MeshPlan((("copy", 2), ("tensor", 2)))
TWO_COPIES = MeshPlan((("copy", 2),))
FOUR_COPIES = MeshPlan((("copy", 4),))
TWO_HEAD_AXES = MeshPlan((("x", 2), ("y", 4)), heads=("x", "y"))
SHUFFLED = MeshPlan((("data", 2), ("tensor", 2), ("copy", 2)), is_shuffled=True)
SHUFFLED_LINE = MeshPlan((("tensor", 4),), is_shuffled=True)


def put(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The parts of ``host`` that lie in this process, as an array over all that ``sharding`` names.

    JAX owns the buffers: those of NumPy are never donated. Each part is put by itself, because JAX cuts an
    array with a program, which quiets some NaNs of 8 bits.
    """
    index_of = sharding.addressable_devices_indices_map(host.shape)
    parts = [jax.device_put(jnp.array(host[index], copy=True), device) for device, index in index_of.items()]
    return jax.make_array_from_single_device_arrays(host.shape, sharding, parts)


def put_on_mesh(case: LayoutCase, plan: MeshPlan, host_caches: Any) -> dict[str, Any]:
    """``host_caches`` spread as serving stacks do."""
    made: dict[int, jax.Array] = {}

    def put_layer(name: str, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        for page, leaf in zip(case.pages[name], leaves, strict=True):
            if id(leaf) not in made:
                made[id(leaf)] = put(leaf, plan.sharding(page, leaf.shape))
        return treedef.unflatten(made[id(leaf)] for leaf in leaves)

    return {name: put_layer(name, tree) for name, tree in host_caches.items()}


def random_host(case: LayoutCase, seed: int) -> dict[str, Any]:
    """NumPy caches of random bits."""
    caches: dict[str, Any] = numpy_copy(case.build(seed))
    return caches


def register(
    case: LayoutCase, plan: MeshPlan, host_caches: Any, **options: Any
) -> tuple[dict[str, Any], CanonicalKVCaches]:
    """Caches on a mesh and their canonical form."""
    kv_caches = put_on_mesh(case, plan, host_caches)
    return kv_caches, canonicalize(kv_caches, case.config, case.hints, **options)


def groups_of(canonical: CanonicalKVCaches) -> Iterator[GroupId]:
    return map(GroupId, range(len(canonical.groups)))


def pointers(kv_caches: Any) -> list[int]:
    """Where every part of every leaf lies."""
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(kv_caches)
        for shard in leaf.addressable_shards
    ]


def to_host(kv_caches: Any) -> Any:
    """NumPy copies of caches that are not written any more: NumPy may keep views of them."""
    return jax.tree.map(np.array, kv_caches)
