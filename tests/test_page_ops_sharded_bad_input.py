"""Leaves, ids and records that the page ops on a mesh refuse: each by name, with what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import DATA_BY_TENSOR, REPLICATED, TWO_LEAVES, gather_of

from jaxkv.errors import BlockIdError, CacheMismatchError, ConfigError
from jaxkv.host_pool import HostPool
from jaxkv.transfer import ops

each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@each_axis_type
@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ((P(), P()), r"a device held \(5, 4, 4, 6\) of it"),
        ((P(None, None, "x"), P(None, None, None, "x")), r"leaf1 .* a device held \(5, 4, 4, 6\) of it"),
        ((P(None, None, "x"), P(None, None, "y")), "leaf1 .* other mesh axes cut a leaf before it"),
    ],
    ids=["replicated", "cut on another dimension", "cut by another mesh axis"],
)
def test_leaves_that_lie_otherwise_than_registered_are_refused(
    specs: tuple[P, P], reason: str, axis_type: AxisType
) -> None:
    mesh = TWO_LEAVES.build_mesh(axis_type)
    _, leaves = TWO_LEAVES.build(mesh)
    pages = TWO_LEAVES.pages(leaves)
    moved = [
        jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)
    ]
    if axis_type == AxisType.Explicit:
        with pytest.raises(CacheMismatchError, match=reason):
            gather_of(pages)(TWO_LEAVES.ids, moved)
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"CacheMismatchError: .*{reason}"):
            gather_of(pages)(TWO_LEAVES.ids, moved)


def test_leaves_that_were_registered_whole_are_refused_in_parts_where_types_say_so() -> None:
    case = REPLICATED
    mesh = case.build_mesh(AxisType.Explicit)
    _, leaves = case.build(mesh)
    pages = case.pages(leaves)
    with pytest.raises(CacheMismatchError, match=r"leaf0 .* lies as"):
        gather_of(pages)(case.ids, [jax.device_put(leaves[0], NamedSharding(mesh, P(None, "x")))])


def test_leaves_whole_on_one_device_are_refused() -> None:
    logical, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(AxisType.Auto))
    pages = DATA_BY_TENSOR.pages(leaves)
    with pytest.raises(CacheMismatchError, match="leaf 0 lies whole on one device"):
        gather_of(pages)(DATA_BY_TENSOR.ids, [jnp.array(logical[0])])


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((5, 4, 8, 6), (5, 4, 7, 6)), "leaf 1 has shape .* no multiple of"),
        (((5, 4, 8, 6), (0, 4, 8, 6)), "leaf 1 has shape .* no multiple of"),
        (((5, 4, 8, 6), (5, 4, 8)), "leaf 1 has shape .* no multiple of"),
        (((5, 4, 8, 6), (5, 4, 16, 6)), "cut in different ways"),
        (((5, 4, 8, 6), (10, 4, 8, 6)), "cut in different ways"),
    ],
)
def test_shapes_that_cannot_be_what_was_registered_are_refused(
    shapes: tuple[tuple[int, ...], ...], reason: str
) -> None:
    _, leaves = TWO_LEAVES.build(TWO_LEAVES.build_mesh(AxisType.Auto))
    pages = TWO_LEAVES.pages(leaves)
    with pytest.raises(CacheMismatchError, match=reason):
        ops.gather_pages([jnp.zeros(shape, jnp.bfloat16) for shape in shapes], TWO_LEAVES.ids, pages)


@pytest.mark.parametrize("manual", [{"data"}, {"data", "tensor"}], ids=["one axis", "all axes"])
def test_a_shard_map_that_leaves_a_leaf_in_parts_is_refused(manual: set[str]) -> None:
    mesh = DATA_BY_TENSOR.build_mesh(AxisType.Auto)
    _, leaves = DATA_BY_TENSOR.build(mesh)
    pages = DATA_BY_TENSOR.pages(leaves)
    mapped = jax.shard_map(
        lambda ids, leaf: ops.gather_pages([leaf], ids, pages),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
        axis_names=manual,
    )
    with pytest.raises(CacheMismatchError, match="more than one device holds"):
        jax.jit(mapped)(DATA_BY_TENSOR.ids, leaves[0])


def test_a_mesh_with_axes_of_two_types_is_refused() -> None:
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), (AxisType.Explicit, AxisType.Auto), devices=jax.devices()[:4]
    )
    _, leaves = DATA_BY_TENSOR.build(mesh)
    pages = DATA_BY_TENSOR.pages(leaves)
    with pytest.raises(CacheMismatchError, match="make them all Auto or all Explicit"):
        gather_of(pages)(DATA_BY_TENSOR.ids, leaves)


def test_the_old_partitioner_is_refused() -> None:
    _, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(AxisType.Auto))
    pages = DATA_BY_TENSOR.pages(leaves)
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with pytest.raises(ConfigError, match="Shardy"):
            gather_of(pages)(DATA_BY_TENSOR.ids, leaves)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


@each_axis_type
def test_ids_and_records_that_no_data_shard_can_own_are_refused(axis_type: AxisType) -> None:
    _, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(axis_type))
    pages = DATA_BY_TENSOR.pages(leaves)
    with pytest.raises(BlockIdError, match="3 entries for 2 data shards"):
        ops.gather_pages(leaves, np.zeros(3, np.int32), pages)
    for shape in ((4, pages.record_bytes), (2, 2 * pages.record_bytes), (4, 2 * pages.record_bytes - 2)):
        with pytest.raises(CacheMismatchError, match="staging has shape"):
            ops.scatter_pages(jnp.zeros(shape, jnp.uint8), np.zeros(4, np.int32), leaves, pages)


@each_axis_type
def test_grad_and_vmap_are_refused_when_they_are_traced(axis_type: AxisType) -> None:
    _, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(axis_type))
    pages = DATA_BY_TENSOR.pages(leaves)
    with pytest.raises(NotImplementedError):
        jax.vmap(lambda ids: ops.gather_pages(leaves, ids, pages))(np.zeros((2, 4), np.int32))
    staging = jnp.zeros((4, 2 * pages.record_bytes), jnp.uint8)
    with pytest.raises((NotImplementedError, ValueError), match="ifferentiat"):
        jax.grad(lambda leaf: ops.scatter_pages(staging, np.zeros(4, np.int32), [leaf], pages)[0][0].sum())(
            leaves[0]
        )


def test_pool_ops_refuse_leaves_in_parts() -> None:
    _, leaves = DATA_BY_TENSOR.build(DATA_BY_TENSOR.build_mesh(AxisType.Auto))
    pages = DATA_BY_TENSOR.pages(leaves)
    no_ids = jnp.zeros(0, jnp.int32)
    with HostPool(1 << 16) as pool, pytest.raises(CacheMismatchError, match="use BlockTransfer"):
        ops.offload(pool, pool.token(), leaves, no_ids, no_ids, pages)
