"""Blocks of caches on a mesh, offloaded and restored: every layout, many meshes, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_caches import (
    COPIES,
    DATA_2,
    DATA_2_TENSOR_2,
    DATA_2_TENSOR_4,
    FOUR_COPIES,
    MESH_CASES,
    SHUFFLED,
    SHUFFLED_LINE,
    TENSOR_2,
    TENSOR_4,
    TENSOR_8,
    TWO_COPIES,
    TWO_HEAD_AXES,
    MeshPlan,
    groups_of,
    pointers,
    put_on_mesh,
    random_host,
    register,
    to_host,
)

from jaxkv.errors import DeletedCacheError
from jaxkv.host_pool import HostPool
from jaxkv.spec import FullAttentionSpec
from jaxkv.testing import LayoutCase, assert_same_bytes, assert_same_caches
from jaxkv.testing.case_parts import CaseGroup, make_case, split_leaf, stored_bytes
from jaxkv.transfer import BlockTransfer


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    with HostPool(4 << 20) as opened:
        yield opened


def move_everything(
    case: LayoutCase, plan: MeshPlan, backend: str, pool: HostPool, *, is_portable: bool
) -> None:
    """Moves random blocks of all groups and data shards from one cache to another, and checks all bytes."""
    case = case.with_data_shards(plan.num_data_shards)
    source_host, target_host = random_host(case, 1), random_host(case, 2)
    source, canonical = register(case, plan, source_host, portable_pages=is_portable)
    target = put_on_mesh(case, plan, target_host)
    before = pointers(target)
    rng = np.random.default_rng(0)
    for data_shard in range(plan.num_data_shards):
        transfer = BlockTransfer(canonical, pool, backend=backend, data_shard=data_shard)
        given = case.data_shard(source_host, data_shard, plan.num_data_shards)
        wanted = case.data_shard(target_host, data_shard, plan.num_data_shards)
        for group in groups_of(canonical):
            record = canonical.records[group]
            for _ in range(2):
                ids = rng.permutation(record.num_blocks)[: max(1, record.num_blocks // 2)]
                into = rng.permutation(record.num_blocks)[: len(ids)]
                with transfer.reserve(group, len(ids)) as slots:
                    result = transfer.offload(source, group, ids, slots).wait()
                    assert result.error is None
                    assert result.num_bytes == len(ids) * record.block_bytes
                    for block, place, slot in zip(ids, into, slots, strict=True):
                        page = case.oracle(given, group, block, plan.num_devices, is_portable=is_portable)
                        held = bytes(pool.view(slot))
                        assert_same_bytes(held[: record.block_bytes], page, f"block {block}")
                        assert held[record.block_bytes :] == bytes(len(held) - record.block_bytes)
                        case.poke(wanted, group, place, page, plan.num_devices, is_portable=is_portable)
                    old = target
                    target, ticket = transfer.restore(target, group, into, slots)
                    assert ticket.wait().error is None
                    with pytest.raises(DeletedCacheError):
                        transfer.offload(old, group, ids, slots)
        if transfer.backend.restores_in_place:
            assert transfer.num_copied_leaves == 0
    if transfer.backend.restores_in_place:
        assert pointers(target) == before
    assert_same_caches(to_host(target), target_host)
    assert_same_caches(to_host(source), source_host)


@pytest.mark.parametrize("case", MESH_CASES.values(), ids=str)
def test_every_layout_moves_out_of_one_data_shard_into_another(case: LayoutCase, pool: HostPool) -> None:
    move_everything(case, DATA_2_TENSOR_2, "cpu", pool, is_portable=True)


@pytest.mark.parametrize("is_portable", [False, True], ids=["per_shard", "portable"])
@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (TENSOR_4, "separate_kv"),
        (TENSOR_4, "hybrid"),
        (TENSOR_8, "kv_axis_second_heads_outside"),
        (TENSOR_8, "head_major_int8_scales_float32"),
        (DATA_2, "dense_rows"),
        (DATA_2, "mla"),
        (DATA_2_TENSOR_4, "kernel_blocks"),
        (DATA_2_TENSOR_4, "dense_stacked_by_request"),
        (COPIES, "packed_kv"),
        (COPIES, "mamba2_conv_by_channel"),
        (FOUR_COPIES, "hybrid"),
        (TWO_HEAD_AXES, "kv_axis_first"),
        (SHUFFLED, "head_major"),
        (SHUFFLED, "gated_delta_net"),
    ],
    ids=str,
)
def test_layouts_move_on_meshes(plan: MeshPlan, name: str, pool: HostPool, *, is_portable: bool) -> None:
    move_everything(MESH_CASES[name], plan, "cpu", pool, is_portable=is_portable)


# Each device compiles its own programs, and plain JAX takes long over them: few devices.
@pytest.mark.parametrize(
    ("plan", "name", "is_portable"),
    [
        (TENSOR_2, "float4_scales_float8_e4m3fn", False),
        (TENSOR_2, "head_major", True),
        (DATA_2, "dense_int4", True),
        (TWO_COPIES, "mla", False),
        (SHUFFLED_LINE, "mamba2_conv_by_channel", True),
    ],
    ids=str,
)
def test_plain_jax_moves_the_same_bytes(
    plan: MeshPlan, name: str, pool: HostPool, *, is_portable: bool
) -> None:
    move_everything(MESH_CASES[name], plan, "xla", pool, is_portable=is_portable)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("plan", [TENSOR_2, DATA_2], ids=str)
def test_blocks_move_inside_a_mesh_that_the_caller_has_set(
    plan: MeshPlan, backend: str, pool: HostPool
) -> None:
    with jax.set_mesh(plan.make()):
        move_everything(MESH_CASES["packed_kv"], plan, backend, pool, is_portable=False)


DTYPES = (
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16", "float32", "complex64"),
)


def every_dtype() -> LayoutCase:
    """One layer with an array of each dtype, all split over the same devices."""
    tree = {name: split_leaf((6, 2, 8, 8), getattr(jnp, name), 0, 2) for name in DTYPES}
    spec = FullAttentionSpec(2, 8, 8, jnp.bfloat16, page_size_bytes=stored_bytes(tree, 6))
    return make_case("every_dtype", CaseGroup(spec, 6, {"a": tree}))


@pytest.mark.parametrize("is_portable", [False, True], ids=["per_shard", "portable"])
def test_every_dtype_moves_on_a_mesh(pool: HostPool, *, is_portable: bool) -> None:
    move_everything(every_dtype(), TENSOR_4, "cpu", pool, is_portable=is_portable)
