"""The page ops on leaves that a mesh shares out, under the caller's own ``jit`` and ``shard_map``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    CASES,
    DATA_BY_TENSOR,
    NUM_BLOCKS,
    Case,
    gather_of,
    random_cases,
    scatter_of,
)

from jaxkv.canonical import canonicalize
from jaxkv.errors import CacheMismatchError
from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import ops
from jaxkv.transfer.status import STATUS_SIZE, StatusEntry

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def pointers(leaves: Sequence[jax.Array]) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]


def require_no_collectives_and_no_leaf_made(compiled: Any, leaves: Sequence[jax.Array]) -> None:
    """No instruction of the program moves bytes between devices, and none but the ops makes a leaf."""
    text = compiled.as_text()
    for name in COLLECTIVES:
        assert name not in text
    local = {",".join(map(str, leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves}
    whole = {",".join(map(str, leaf.shape)) for leaf in leaves}
    made_by = [
        opcode
        for shape, opcode in re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", text)
        if shape in local | whole
    ]
    assert set(made_by) <= {"parameter", "get-tuple-element", "custom-call", "bitcast"}
    assert made_by


def require_every_copy_equals(leaf: jax.Array, expected: np.ndarray) -> None:
    for shard in leaf.addressable_shards:
        assert_same_bytes(shard.data, expected[shard.index], f"device {shard.device.id}")


def counts(status: jax.Array) -> list[dict[str, int]]:
    """The non-zero counts by data shard."""
    return [
        {
            entry.name: int(n)
            for entry, n in zip(StatusEntry, row, strict=True)
            if n and entry < StatusEntry.FIRST_REFUSED
        }
        for row in np.array(status).reshape(-1, STATUS_SIZE)
    ]


@each_axis_type
@each_case
def test_gathered_records_equal_slices_of_the_logical_leaves(case: Case, axis_type: AxisType) -> None:
    logical, leaves = case.build(case.build_mesh(axis_type))
    pages = case.pages(leaves)
    compiled = gather_of(pages).lower(case.ids, leaves).compile()
    staging = compiled(case.ids, leaves)
    assert_same_bytes(staging, case.records(logical, pages.record_bytes))
    local = (staging.shape[0] // case.num_data, pages.record_bytes)
    assert staging.sharding.shard_shape(staging.shape) == local
    require_no_collectives_and_no_leaf_made(compiled, leaves)


@each_axis_type
@each_case
def test_records_are_scattered_in_place_on_every_device(case: Case, axis_type: AxisType) -> None:
    mesh = case.build_mesh(axis_type)
    logical, leaves = case.build(mesh)
    source, _ = case.build(mesh, seed=2)
    pages = case.pages(leaves)
    staging = case.records(source, pages.record_bytes)
    case.overwrite(logical, source)
    before, shardings = pointers(leaves), [leaf.sharding for leaf in leaves]
    compiled = scatter_of(pages).lower(staging, case.ids, leaves).compile()
    require_no_collectives_and_no_leaf_made(compiled, leaves)
    written, status = compiled(staging, case.ids, leaves)
    assert pointers(written) == before
    for leaf, expected, sharding in zip(written, logical, shardings, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        require_every_copy_equals(leaf, expected)
    assert counts(status) == [{"MOVED": 3}, {"MOVED": 2, "BAD_BLOCK": 1}][: case.num_data]


@given(case=random_cases(), axis_type=st.sampled_from([AxisType.Auto, AxisType.Explicit]))
@settings(max_examples=12)
def test_random_meshes_gather_and_scatter_byte_for_byte(case: Case, axis_type: AxisType) -> None:
    mesh = case.build_mesh(axis_type)
    logical, leaves = case.build(mesh)
    source, others = case.build(mesh, seed=2)
    pages = case.pages(leaves)
    staging = gather_of(pages)(case.ids, others)
    assert_same_bytes(staging, case.records(source, pages.record_bytes))
    before = pointers(leaves)
    written, _ = scatter_of(pages)(staging, case.ids, leaves)
    assert pointers(written) == before
    case.overwrite(logical, source)
    for leaf, expected in zip(written, logical, strict=True):
        require_every_copy_equals(leaf, expected)


def test_blocks_in_rows_are_cut_between_rows() -> None:
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    logical = np.random.default_rng(1).integers(0, 256, (4, 3, 32), dtype=np.uint8)
    leaf = jax.device_put(logical, NamedSharding(mesh, P("data")))
    config = KVCacheConfig((KVCacheGroupSpec(("layer",), MambaSpec(16, ((32,),), (jnp.uint8,)), 6),))
    pages = canonicalize({"layer": leaf}, config, {"layer": LayoutHint(block_axis=(0, 1))}).groups[0]
    staging = gather_of(pages)(np.array([5, 0, 1, 3], np.int32), [leaf])
    rows = [logical[1, 2], logical[0, 0], logical[2, 1], logical[3, 0]]
    assert_same_bytes(np.array(staging)[:, :32], np.stack(rows))
    with pytest.raises(CacheMismatchError, match="cut axis 0 instead"):
        ops.gather_pages([jnp.zeros((2, 6, 32), jnp.uint8)], np.zeros(2, np.int32), pages)


@each_axis_type
def test_page_ops_run_outside_of_jit(axis_type: AxisType) -> None:
    case = DATA_BY_TENSOR
    logical, leaves = case.build(case.build_mesh(axis_type))
    pages = case.pages(leaves)
    staging = ops.gather_pages(leaves, case.ids, pages)
    assert_same_bytes(staging, case.records(logical, pages.record_bytes))
    (written,), _ = ops.scatter_pages(jnp.zeros_like(staging), case.ids, leaves, pages)
    require_every_copy_equals(leaves[0], logical[0])
    case.overwrite(logical, [np.zeros_like(array) for array in logical])
    require_every_copy_equals(written, logical[0])


@each_axis_type
def test_page_ops_run_in_a_scan_in_place(axis_type: AxisType) -> None:
    case = DATA_BY_TENSOR
    mesh = case.build_mesh(axis_type)
    logical, leaves = case.build(mesh)
    pages = case.pages(leaves)

    def shift(carry: list[jax.Array], block: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        staging = ops.gather_pages(carry, block, pages)
        return ops.scatter_pages(staging, block + 1, carry, pages)

    steps = np.repeat(np.arange(NUM_BLOCKS - 1, dtype=np.int32)[:, None], 2, axis=1)
    steps = jax.device_put(steps, NamedSharding(mesh, P(None, "data")))
    before = pointers(leaves)
    scan = jax.jit(lambda xs, blocks: jax.lax.scan(shift, xs, blocks), donate_argnums=0)
    text = scan.lower(leaves, steps).compile().as_text()
    assert not [name for name in COLLECTIVES if name in text]
    written, _ = scan(leaves, steps)
    assert pointers(written) == before
    for data in range(2):
        rows = logical[0][data * NUM_BLOCKS : (data + 1) * NUM_BLOCKS]
        rows[1:] = rows[0]
    require_every_copy_equals(written[0], logical[0])


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@each_axis_type
def test_under_shard_map_every_device_moves_what_it_holds(axis_type: AxisType, check_vma: bool) -> None:
    case = DATA_BY_TENSOR
    mesh = case.build_mesh(axis_type)
    logical, leaves = case.build(mesh)
    pages = case.pages(leaves)
    ids = jax.device_put(case.ids, NamedSharding(mesh, P("data")))

    def move(block_ids: jax.Array, local: list[jax.Array]) -> Any:
        def step(carry: list[jax.Array], shift: jax.Array) -> Any:
            staging = ops.gather_pages(carry, block_ids, pages)
            written, status = ops.scatter_pages(staging, block_ids + shift, carry, pages)
            return written, (staging, status)

        return jax.lax.scan(step, local, jnp.array([1], jnp.int32))

    specs = [leaf.spec for leaf in case.leaves]
    out_specs = (specs, (P(None, "data", "tensor"), P(None, ("data", "tensor"))))
    mapped = jax.shard_map(
        move, mesh=mesh, in_specs=(P("data"), specs), out_specs=out_specs, check_vma=check_vma
    )
    before, expected = pointers(leaves), case.records(logical, pages.record_bytes)
    written, (staging, status) = jax.jit(mapped, donate_argnums=1)(ids, leaves)
    assert pointers(written) == before
    assert_same_bytes(staging, expected)
    # The record of an id that names no block is zero, and went to the block after it.
    first, second = logical[0][:NUM_BLOCKS], logical[0][NUM_BLOCKS:]
    first[[4, 1, 0]] = np.stack([first[3], first[0], np.zeros_like(first[0])])
    second[[2, 1, 0]] = np.stack([second[1], second[0], np.zeros_like(second[0])])
    require_every_copy_equals(written[0], logical[0])
    by_device = np.array(status).reshape(2, 2, STATUS_SIZE)
    assert by_device[:, :, StatusEntry.MOVED].tolist() == [[3, 3], [3, 3]]
    assert by_device[:, :, StatusEntry.BAD_BLOCK].tolist() == [[1, 1], [1, 1]]


@each_axis_type
def test_ids_and_records_that_lie_otherwise_leave_the_leaves_alone(axis_type: AxisType) -> None:
    case = DATA_BY_TENSOR
    mesh = case.build_mesh(axis_type)
    logical, leaves = case.build(mesh)
    source, _ = case.build(mesh, seed=2)
    pages = case.pages(leaves)
    across = NamedSharding(mesh, P("tensor"))
    ids = jax.device_put(case.ids, across)
    staging = jax.device_put(case.records(source, pages.record_bytes), across)
    assert_same_bytes(gather_of(pages)(ids, leaves), case.records(logical, pages.record_bytes))
    case.overwrite(logical, source)
    before, sharding = pointers(leaves), leaves[0].sharding
    (written,), _ = scatter_of(pages)(staging, ids, leaves)
    assert pointers([written]) == before
    assert written.sharding.is_equivalent_to(sharding, written.ndim)
    require_every_copy_equals(written, logical[0])


def test_no_ids_move_nothing_on_a_mesh() -> None:
    logical, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(AxisType.Auto))
    pages = DATA_BY_TENSOR.pages(leaves)
    no_ids = np.zeros(0, np.int32)
    staging = gather_of(pages)(no_ids, leaves)
    assert staging.shape == (0, 2 * pages.record_bytes)
    (written,), status = scatter_of(pages)(staging, no_ids, leaves)
    assert counts(status) == [{}, {}]
    require_every_copy_equals(written, logical[0])
