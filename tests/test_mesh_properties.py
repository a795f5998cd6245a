"""Caches of random shapes on random meshes: records tile, and what was offloaded comes back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mesh_caches import put

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing import assert_same_bytes, check_record_coverage
from jaxkv.testing.arrays import as_bytes, from_bytes
from jaxkv.transfer import BlockTransfer

GROUP = GroupId(0)
MESHES = [(d, t, u) for d, t, u in itertools.product((1, 2, 3), (1, 2, 4), (1, 2)) if d * t * u <= 8]


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


@dataclass(frozen=True)
class State:
    """One leaf: blocks along ``block_axis``, other axes split into ``parts``, as mesh axes say."""

    shape: tuple[int, ...]
    dtype: Any
    block_axis: int
    spec: PartitionSpec
    parts: tuple[int, ...]
    head_axis: int | None

    @property
    def page_shape(self) -> tuple[int, ...]:
        return self.shape[: self.block_axis] + self.shape[self.block_axis + 1 :]

    @property
    def is_portable(self) -> bool:
        """Whole on each device, or split along the one axis that its hint names."""
        split = [axis for axis, count in enumerate(self.parts) if count > 1 and axis != self.block_axis]
        return split in ([], [self.head_axis])

    def pages(self, block: np.ndarray, *, portable_pages: bool) -> Iterator[np.ndarray]:
        """What of ``block`` (an entry of the block axis) stands in the record one after another: views."""
        cells = itertools.product(
            *(range(1 if axis == self.block_axis else n) for axis, n in enumerate(self.parts))
        )
        if portable_pages and self.is_portable:
            cells = [(0,) * len(self.parts)]
        counts = (1,) * len(self.parts) if portable_pages and self.is_portable else self.parts
        for cell in cells:
            index = []
            for axis, (at, count, size) in enumerate(zip(cell, counts, block.shape, strict=True)):
                whole = axis == self.block_axis
                index.append(slice(None) if whole else slice(at * size // count, (at + 1) * size // count))
            yield block[tuple(index)]


@dataclass(frozen=True)
class Model:
    """One layer with several states on a mesh of data shards times two other axes."""

    sizes: tuple[int, int, int]
    mesh: Mesh
    num_blocks: int
    states: tuple[State, ...]

    def config(self) -> KVCacheConfig:
        spec = MambaSpec(8, tuple(s.page_shape for s in self.states), tuple(s.dtype for s in self.states))
        return KVCacheConfig((KVCacheGroupSpec(("a",), spec, self.num_blocks),))

    def host(self, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [
            from_bytes(rng.bytes(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize), s.dtype, s.shape)
            for s in self.states
        ]

    def put(self, host: list[np.ndarray]) -> dict[str, Any]:
        pairs = zip(host, self.states, strict=True)
        return {"a": [put(leaf, NamedSharding(self.mesh, state.spec)) for leaf, state in pairs]}

    def canonicalize(self, kv_caches: Any, *, portable_pages: bool) -> CanonicalKVCaches:
        hints = {"a": [LayoutHint(state.block_axis, head_axis=state.head_axis) for state in self.states]}
        return canonicalize(kv_caches, self.config(), hints, portable_pages=portable_pages)

    def pages(
        self, host: list[np.ndarray], data_shard: int, block: int, *, portable_pages: bool
    ) -> list[np.ndarray]:
        """Views of ``host``: the pages of a block in the order of its record."""
        found = []
        for leaf, state in zip(host, self.states, strict=True):
            at = data_shard * self.num_blocks + block
            index = (*[slice(None)] * state.block_axis, slice(at, at + 1))
            found += state.pages(leaf[index], portable_pages=portable_pages)
        return found


@st.composite
def states(draw: Any, num_blocks: int, sizes: tuple[int, int, int]) -> State:
    """Both other mesh axes split some axis of the page, the same one or two, or none."""
    rank = draw(st.integers(1, 3))
    block_axis = draw(st.integers(0, rank))
    others = [axis for axis in range(rank + 1) if axis != block_axis]
    names: list[list[str]] = [[] for _ in range(rank + 1)]
    parts = [1] * (rank + 1)
    for name, size in draw(st.permutations(list(zip("tu", sizes[1:], strict=True)))):
        axis = draw(st.sampled_from([None, *others]))
        if axis is not None:
            names[axis].append(name)
            parts[axis] *= size
    shape = [draw(st.integers(1, 3)) * count for count in parts]
    names[block_axis], parts[block_axis], shape[block_axis] = ["d"], sizes[0], sizes[0] * num_blocks
    return State(
        tuple(shape),
        draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.uint8])),
        block_axis,
        PartitionSpec(*(tuple(of_axis) or None for of_axis in names)),
        tuple(parts),
        draw(st.sampled_from([None, *others])),
    )


@st.composite
def models(draw: Any) -> Model:
    sizes = draw(st.sampled_from(MESHES))
    devices = draw(st.permutations(range(8)))[: int(np.prod(sizes))]
    order = draw(st.permutations(range(3)))
    grid = np.array([jax.devices("cpu")[at] for at in devices]).reshape([sizes[axis] for axis in order])
    num_blocks = draw(st.integers(1, 4))
    made = draw(st.lists(states(num_blocks, sizes), min_size=1, max_size=3))
    return Model(sizes, Mesh(grid, tuple("dtu"[axis] for axis in order)), num_blocks, tuple(made))


def local_bytes(leaf: jax.Array) -> int:
    return int(leaf.addressable_shards[0].data.nbytes)


@settings(max_examples=40)
@given(models(), st.booleans())
def test_what_devices_write_tiles_each_record_exactly_once(model: Model, portable_pages: bool) -> None:
    kv_caches = model.put(model.host(1))
    canonical = model.canonicalize(kv_caches, portable_pages=portable_pages)
    check_record_coverage(canonical.records[0], [local_bytes(leaf) for leaf in canonical.leaves(kv_caches)])
    expected = sum(page.nbytes for page in model.pages(model.host(1), 0, 0, portable_pages=portable_pages))
    assert canonical.records[0].block_bytes == expected
    assert bool(canonical.per_shard_layers) == (
        portable_pages and not all(state.is_portable for state in model.states)
    )


@settings(max_examples=12)
@given(models(), st.booleans(), st.data())
def test_what_is_offloaded_scrambled_and_restored_is_as_before(
    pool: HostPool,
    model: Model,
    portable_pages: bool,
    data: Any,
) -> None:
    source, others = model.host(1), model.host(2)
    kv_caches, target = model.put(source), model.put(others)
    canonical = model.canonicalize(kv_caches, portable_pages=portable_pages)
    data_shard = data.draw(st.integers(0, model.sizes[0] - 1))
    blocks = data.draw(st.permutations(range(model.num_blocks)))
    into = data.draw(st.permutations(blocks))
    transfer = BlockTransfer(canonical, pool, backend="cpu", data_shard=data_shard)
    with transfer.reserve(GROUP, len(blocks)) as slots:
        assert transfer.offload(kv_caches, GROUP, blocks, slots).wait().error is None
        for block, place, slot in zip(blocks, into, slots, strict=True):
            given_pages = model.pages(source, data_shard, block, portable_pages=portable_pages)
            record = b"".join(as_bytes(page).tobytes() for page in given_pages)
            assert_same_bytes(bytes(pool.view(slot)[: len(record)]), record)
            wanted_pages = model.pages(others, data_shard, place, portable_pages=portable_pages)
            for page, wanted in zip(given_pages, wanted_pages, strict=True):
                wanted[...] = page
        target, ticket = transfer.restore(target, GROUP, into, slots)
        assert ticket.wait().error is None
    assert transfer.num_copied_leaves == 0
    for leaf, expected in zip(target["a"], others, strict=True):
        assert_same_bytes(np.array(leaf), expected)
