"""Groups of leaves on meshes, and what gathering and scattering them means, said in NumPy.

Independent of page plans and of shardings: a device's part is a slice of the logical array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv.canonical import canonicalize
from jaxkv.layout import LayoutHint
from jaxkv.records import GroupPages
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.transfer import ops

NUM_BLOCKS = 5
IDS = np.array([[3, -1, 0, 4], [1, 0, 9, -1], *[[-1, shard % 5, 5, -7] for shard in range(6)]], np.int32)
"""By data shard. All but the first name blocks that they do not have."""


@dataclass(frozen=True)
class Leaf:
    """One leaf of a case: its shape and how many ways each axis is cut, blocks on ``block_axis``."""

    shape: tuple[int, ...]
    dtype: Any
    spec: P
    splits: tuple[int, ...]
    block_axis: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(size // n for size, n in zip(self.shape, self.splits, strict=True))


@dataclass(frozen=True)
class Case:
    """Leaves of one group on a mesh with ``num_data`` times ``num_tensor`` shards."""

    name: str
    mesh: Mapping[str, int]
    leaves: tuple[Leaf, ...]
    num_data: int
    num_tensor: int

    def __str__(self) -> str:
        return self.name

    def build_mesh(self, axis_type: AxisType) -> Mesh:
        devices = jax.devices()[: math.prod(self.mesh.values())]
        return jax.make_mesh(
            tuple(self.mesh.values()), tuple(self.mesh), (axis_type,) * len(self.mesh), devices=devices
        )

    def build(self, mesh: Mesh, seed: int = 1) -> tuple[list[np.ndarray], list[jax.Array]]:
        """Random bits, logical and on ``mesh``. XLA owns the buffers, so that they can be donated."""
        rng = np.random.default_rng(seed)
        logical = []
        for leaf in self.leaves:
            dtype = np.dtype(leaf.dtype)
            raw = rng.integers(0, 256, (*leaf.shape, dtype.itemsize), dtype=np.uint8)
            logical.append(raw.view(dtype).reshape(leaf.shape))
        return logical, [
            jnp.copy(jax.device_put(array, NamedSharding(mesh, leaf.spec)))
            for array, leaf in zip(logical, self.leaves, strict=True)
        ]

    def pages(self, leaves: Sequence[jax.Array]) -> GroupPages:
        """What registering ``leaves`` says of one device."""
        shapes = tuple(
            tuple(size for axis, size in enumerate(leaf.shape) if axis != leaf.block_axis)
            for leaf in self.leaves
        )
        spec = MambaSpec(16, shapes, tuple(leaf.dtype for leaf in self.leaves))
        config = KVCacheConfig((KVCacheGroupSpec(("layer",), spec, NUM_BLOCKS),))
        hints = {"layer": [LayoutHint(block_axis=leaf.block_axis) for leaf in self.leaves]}
        return canonicalize({"layer": tuple(leaves)}, config, hints).groups[0]

    @property
    def ids(self) -> np.ndarray:
        return IDS[: self.num_data].reshape(-1)

    def shard(self, array: np.ndarray, leaf: Leaf, data: int, tensor: int) -> np.ndarray:
        """A view of what one device holds: data shards along blocks, tensor shards row-major."""
        through = [n for axis, n in enumerate(leaf.splits) if axis != leaf.block_axis]
        cell = list(np.unravel_index(tensor if math.prod(through) > 1 else 0, through))
        cell.insert(leaf.block_axis, data)
        return array[
            tuple(slice(i * size, (i + 1) * size) for i, size in zip(cell, leaf.local_shape, strict=True))
        ]

    def block(self, array: np.ndarray, leaf: Leaf, where: tuple[int, int], block: int) -> np.ndarray:
        return np.moveaxis(self.shard(array, leaf, *where), leaf.block_axis, 0)[block]

    def records(self, logical: Sequence[np.ndarray], record_bytes: int) -> np.ndarray:
        """What gathering ``ids`` must give."""
        expected = np.zeros((self.ids.size, self.num_tensor, record_bytes), np.uint8)
        for row, data, block in self.entries():
            for tensor in range(self.num_tensor):
                parts = [
                    self.block(array, leaf, (data, tensor), block).tobytes()
                    for array, leaf in zip(logical, self.leaves, strict=True)
                ]
                record = np.frombuffer(b"".join(parts), np.uint8)
                expected[row, tensor, : record.size] = record
        return expected.reshape(self.ids.size, -1)

    def overwrite(self, logical: Sequence[np.ndarray], source: Sequence[np.ndarray]) -> None:
        """What scattering the records of ``source`` must do to ``logical``."""
        for _, data, block in self.entries():
            for tensor in range(self.num_tensor):
                for array, new, leaf in zip(logical, source, self.leaves, strict=True):
                    where = (data, tensor)
                    self.block(array, leaf, where, block)[...] = self.block(new, leaf, where, block)

    def entries(self) -> list[tuple[int, int, int]]:
        """Row, data shard and block of every id that names a block."""
        per_shard = IDS.shape[1]
        found = [(row, row // per_shard, int(block)) for row, block in enumerate(self.ids)]
        return [entry for entry in found if 0 <= entry[2] < NUM_BLOCKS]


def heads(spec: P, *, data: int = 1, tensor: int = 1, dtype: Any = jnp.bfloat16) -> Leaf:
    """A paged leaf [blocks, tokens, heads, 6]: blocks over data shards, heads over tensor shards."""
    return Leaf((data * NUM_BLOCKS, 4, 8, 6), dtype, spec, (data, 1, tensor, 1))


REPLICATED = Case("replicated on 4", {"x": 4}, (heads(P()),), 1, 1)
DATA_BY_TENSOR = Case(
    "data x tensor of 4",
    {"data": 2, "tensor": 2},
    (heads(P("data", None, "tensor"), data=2, tensor=2),),
    2,
    2,
)
CASES = (
    Case("tensor of 2", {"tensor": 2}, (heads(P(None, None, "tensor"), tensor=2),), 1, 2),
    Case("data of 2", {"data": 2}, (heads(P("data"), data=2),), 2, 1),
    REPLICATED,
    DATA_BY_TENSOR,
    Case(
        "data x tensor of 8, mesh axes the other way round",
        {"tensor": 4, "data": 2},
        (heads(P("data", None, "tensor"), data=2, tensor=4),),
        2,
        4,
    ),
    Case(
        "replicated over one of three mesh axes, another of size 1",
        {"data": 2, "copy": 2, "tensor": 2, "one": 1},
        (heads(P(("one", "data"), None, "tensor"), data=2, tensor=2),),
        2,
        2,
    ),
    Case(
        "two mesh axes on one dimension",
        {"x": 2, "y": 2, "data": 2},
        (heads(P("data", None, ("y", "x")), data=2, tensor=4),),
        2,
        4,
    ),
    Case(
        "two dimensions cut, blocks between them",
        {"x": 2, "data": 2, "y": 2},
        (Leaf((8, 2 * NUM_BLOCKS, 4, 6), jnp.float32, P("y", "data", "x"), (2, 2, 2, 1), 1),),
        2,
        4,
    ),
    Case(
        "leaves of several dtypes, cut on other axes and not at all",
        {"data": 2, "tensor": 4},
        (
            Leaf((2 * NUM_BLOCKS, 3, 12), jnp.bfloat16, P("data", None, "tensor"), (2, 1, 4)),
            Leaf((4, 2 * NUM_BLOCKS, 3, 7), jnp.float8_e4m3fn, P("tensor", "data"), (4, 2, 1, 1), 1),
            Leaf((2 * NUM_BLOCKS, 5), jnp.float32, P("data"), (2, 1)),
        ),
        2,
        4,
    ),
)
TWO_LEAVES = Case(
    "two leaves",
    {"x": 2, "y": 2},
    (heads(P(None, None, "x"), tensor=2), heads(P(None, None, "x"), tensor=2)),
    1,
    2,
)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """One or two leaves; mesh axes in any order that cut blocks, up to two other dimensions, or nothing."""
    sizes = draw(st.sampled_from([(2,), (8,), (2, 2), (2, 4), (4, 2), (2, 2, 2)]))
    mesh = dict(zip("abc", sizes, strict=False))
    order = draw(st.permutations(list(mesh)))
    ends = sorted(draw(st.tuples(*[st.integers(0, len(order))] * 3)))
    data, *through = (tuple(order[i:j]) for i, j in zip([0, *ends], ends, strict=False))
    leaves = []
    for is_cut in (True, draw(st.booleans()))[: draw(st.integers(1, 2))]:
        block_axis = draw(st.integers(0, 2))
        axes = list(through) if is_cut else [(), ()]
        axes.insert(block_axis, data)
        splits = tuple(math.prod(mesh[name] for name in names) for names in axes)
        local = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
        local[block_axis] = NUM_BLOCKS
        shape = tuple(size * n for size, n in zip(local, splits, strict=True))
        dtype = draw(st.sampled_from([jnp.uint8, jnp.bfloat16, jnp.float32]))
        leaves.append(Leaf(shape, dtype, P(*axes), splits, block_axis))
    num_data, *num_through = (math.prod(mesh[name] for name in names) for names in (data, *through))
    return Case("random", mesh, tuple(leaves), num_data, math.prod(num_through))


def gather_of(pages: GroupPages) -> Any:
    return jax.jit(lambda ids, leaves: ops.gather_pages(leaves, ids, pages))


def scatter_of(pages: GroupPages) -> Any:
    def scatter(staging: Any, ids: Any, leaves: Any) -> Any:
        return ops.scatter_pages(staging, ids, leaves, pages)

    return jax.jit(scatter, donate_argnums=2)
