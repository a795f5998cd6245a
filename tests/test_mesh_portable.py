"""Portable pages: saved on one number of devices, restored on another, each that of the unsharded cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mesh_caches import (
    COPIES,
    DATA_2,
    DATA_2_TENSOR_2,
    FOUR_COPIES,
    MESH_CASES,
    SHUFFLED,
    TENSOR_2,
    TENSOR_4,
    TENSOR_8,
    TWO_HEAD_AXES,
    MeshPlan,
    groups_of,
    put,
    put_on_mesh,
    random_host,
    register,
    to_host,
)

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.errors import CacheMismatchError
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing import assert_same_bytes, assert_same_caches
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import BlockTransfer

GROUP = GroupId(0)
ONE = MeshPlan((("tensor", 1),))
DEGREES = (ONE, TENSOR_2, TENSOR_4, TENSOR_8)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(4 << 20) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("packed_kv", (*DEGREES, COPIES, TWO_HEAD_AXES)),
        ("kv_axis_first", DEGREES),
        ("head_major_int8_scales_float32", DEGREES),
        ("float4_scales_float8_e4m3fn", DEGREES),
        ("rg_lru", DEGREES),
        ("hybrid", (ONE, TENSOR_4, COPIES)),
        ("mla", (ONE, TENSOR_2, FOUR_COPIES)),
        ("dense_rows", (ONE, TENSOR_2, TENSOR_8)),
    ],
)
def test_blocks_saved_on_any_number_of_devices_are_restored_on_any_other(
    name: str, plans: tuple[MeshPlan, ...], pool: HostPool
) -> None:
    case = MESH_CASES[name]
    source, others = random_host(case, 1), random_host(case, 2)
    registered = [register(case, plan, source, portable_pages=True) for plan in plans]
    assert len({canonical.fingerprint for _, canonical in registered}) == 1
    assert all(not canonical.per_shard_layers for _, canonical in registered)
    transfers = [BlockTransfer(canonical, pool, backend="cpu") for _, canonical in registered]
    targets = [put_on_mesh(case, plan, others) for plan in plans]
    for group in groups_of(registered[0][1]):
        num_blocks = case.config.groups[group].num_blocks
        into = np.random.default_rng(0).permutation(num_blocks)[: len(plans)]
        with transfers[0].reserve(group, len(plans)) as slots:
            for block, slot in enumerate(slots):
                kv_caches, _ = registered[block]
                assert transfers[block].offload(kv_caches, group, [block], [slot]).wait().error is None
                page = case.oracle(source, group, block)
                assert_same_bytes(bytes(pool.view(slot)[: len(page)]), page, str(plans[block]))
                case.poke(others, group, into[block], page)
            for at, transfer in enumerate(transfers):
                targets[at], ticket = transfer.restore(targets[at], group, into, slots)
                assert ticket.wait().error is None
    for target in targets:
        assert_same_caches(to_host(target), others)


@pytest.mark.parametrize("plan", [DATA_2, DATA_2_TENSOR_2, SHUFFLED], ids=str)
def test_data_shards_do_not_show_in_a_page(plan: MeshPlan) -> None:
    case = MESH_CASES["packed_kv"]
    _, alone = register(case, ONE, random_host(case, 0), portable_pages=True)
    wide = case.with_data_shards(plan.num_data_shards)
    _, spread = register(wide, plan, random_host(wide, 0), portable_pages=True)
    assert spread.fingerprint == alone.fingerprint


@pytest.mark.parametrize("portable_pages", [False, True], ids=["per_shard", "portable"])
def test_a_block_of_one_data_shard_is_restored_into_another(portable_pages: bool, pool: HostPool) -> None:
    case = MESH_CASES["packed_kv"].with_data_shards(2)
    host = random_host(case, 1)
    kv_caches, canonical = register(case, DATA_2_TENSOR_2, host, portable_pages=portable_pages)
    giving, taking = (BlockTransfer(canonical, pool, data_shard=shard) for shard in (0, 1))
    with giving.reserve(GROUP, 1) as slots:
        assert giving.offload(kv_caches, GROUP, [4], slots).wait().error is None
        kv_caches, ticket = taking.restore(kv_caches, GROUP, [2], slots)
        assert ticket.wait().error is None
    case.poke(case.data_shard(host, 1, 2), 0, 2, case.oracle(case.data_shard(host, 0, 2), 0, 4))
    assert_same_caches(to_host(kv_caches), host)


def test_pages_in_parts_have_a_fingerprint_for_each_number_of_parts() -> None:
    case = MESH_CASES["packed_kv"]
    host = random_host(case, 0)
    plans = (*DEGREES, TWO_HEAD_AXES, COPIES)
    fingerprints = [register(case, plan, host)[1].fingerprint for plan in plans]
    assert len(set(fingerprints)) == 4
    assert fingerprints[3] == fingerprints[4]  # eight parts, whatever the mesh calls its axes
    assert fingerprints[1] == fingerprints[5]  # two parts, however often each is held


# -- copies of heads ------------------------------------------------------------------------------------


def test_copies_of_a_head_are_one_head_in_the_pool(pool: HostPool) -> None:
    """Two heads on 1, 2, 4 and 8 devices: from four on the cache itself repeats each head for its devices."""
    heads = random_bits((6, 4, 2, 4), 1)
    others = random_bits((6, 4, 2, 4), 2)
    config = one_layer(FullAttentionSpec(4, 2, 4, jnp.bfloat16))
    fingerprints, transfers, targets, records = set(), [], [], []
    for degree in (1, 2, 4, 8):
        copies = max(1, degree // 2)
        sharding = NamedSharding(line_of(degree), PartitionSpec(None, None, "t"))
        source, target = (
            {"a": tuple(put(np.repeat(leaf, copies, axis=2), sharding) for _ in "kv")}
            for leaf in (heads, others)
        )
        hints = {"a": LayoutHint(0, head_axis=2, head_copies=copies)}
        canonical = canonicalize(source, config, hints, portable_pages=True)
        fingerprints.add(canonical.fingerprint)
        transfers.append(BlockTransfer(canonical, pool, backend="cpu"))
        targets.append(target)
        with transfers[-1].reserve(GROUP, 1) as lease:
            assert transfers[-1].offload(source, GROUP, [3], lease).wait().error is None
            records.append(bytes(pool.view(lease[0])))
    assert len(fingerprints) == 1
    page = 2 * as_bytes(heads[3]).tobytes()
    assert records == [page.ljust(len(records[0]), b"\0")] * 4
    others[5] = heads[3]
    with transfers[0].reserve(GROUP, 1) as slots:
        pool.view(slots[0])[:] = records[0]
        for transfer, target in zip(transfers, targets, strict=True):
            restored, ticket = transfer.restore(target, GROUP, [5], slots)
            assert ticket.wait().error is None
            copies = restored["a"][0].shape[2] // 2
            for leaf in restored["a"]:
                assert_same_bytes(np.array(leaf), np.repeat(others, copies, axis=2))


@pytest.mark.parametrize(
    ("heads", "copies"), [(8, 2), (4, 3)], ids=["two_heads_on_a_device", "does_not_divide"]
)
def test_copies_that_do_not_lie_one_to_a_device_are_refused(heads: int, copies: int) -> None:
    leaf = put(random_bits((6, 4, heads, 4), 1), NamedSharding(line_of(4), PartitionSpec(None, None, "t")))
    config = one_layer(FullAttentionSpec(4, heads // copies, 4, jnp.bfloat16))
    with pytest.raises(
        CacheMismatchError, match=r"layer 'a', leaf 0.*head_copies=.* are not one to a device"
    ):
        canonicalize({"a": (leaf, leaf)}, config, {"a": LayoutHint(0, head_axis=2, head_copies=copies)})


# -- what cannot be proven ------------------------------------------------------------------------------


def random_bits(shape: tuple[int, ...], seed: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)
    return bits.view(jnp.bfloat16)


def line_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:num_devices]), ("t",))


def one_layer(spec: Any, num_blocks: int = 6) -> KVCacheConfig:
    return KVCacheConfig((KVCacheGroupSpec(("a",), spec, num_blocks),))


def put_zeros(shape: tuple[int, ...], *spec: str | None, dtype: Any = jnp.bfloat16) -> jax.Array:
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("t", "u"))
    return jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, PartitionSpec(*spec)))


ATTENTION = FullAttentionSpec(4, 8, 4, jnp.bfloat16)
UNKNOWN = r"axis {} is split over devices and not known to list heads"
NOT_PORTABLE = {
    "packed_heads_without_a_hint": (
        ATTENTION,
        LayoutHint(0),
        ((6, 4, 16, 4), None, None, "t"),
        UNKNOWN.format(2),
    ),
    "tokens": (ATTENTION, LayoutHint(0), ((6, 4, 16, 4), None, "t"), UNKNOWN.format(1)),
    "another_axis_than_the_hint_says": (
        FullAttentionSpec(4, 16, 2, jnp.bfloat16),
        LayoutHint(0, head_axis=3),
        ((6, 4, 16, 4), None, None, "t"),
        UNKNOWN.format(2),
    ),
    "two_axes": (
        ATTENTION,
        LayoutHint(0, head_axis=2),
        ((6, 4, 16, 4), None, None, "t", "u"),
        UNKNOWN.format("2, 3"),
    ),
    "cut_rows": (
        FullAttentionSpec(4, 8, 4, jnp.bfloat16),
        LayoutHint(0, page_offset_bytes=8, page_size_bytes=128),
        ((6, 600), None, "t"),
        "cuts its page out of its own part",
    ),
    "convolution": (
        MambaSpec(8, ((3, 16),), (jnp.bfloat16,)),
        LayoutHint(0),
        ((6, 3, 16), None, None, "t"),
        UNKNOWN.format(2),
    ),
    "half_bytes": (
        FullAttentionSpec(4, 4, 4, jnp.int4),
        LayoutHint(0, head_axis=2),
        ((6, 32, 4), None, None, "t"),
        "the parts of two devices share a byte",
    ),
}


@pytest.mark.parametrize("name", NOT_PORTABLE)
def test_pages_that_cannot_be_proven_portable_stay_in_parts_and_say_why(name: str) -> None:
    spec, hint, (shape, *split), reason = NOT_PORTABLE[name]
    dtype = {"cut_rows": jnp.uint8, "half_bytes": jnp.int4}.get(name, jnp.bfloat16)
    caches = {"a": put_zeros(shape, *split, dtype=dtype)}
    canonical = canonicalize(caches, one_layer(spec), {"a": hint}, portable_pages=True)
    in_parts = canonicalize(caches, one_layer(spec), {"a": hint})
    assert list(canonical.per_shard_layers) == ["a"]
    assert "layer 'a', leaf 0" in canonical.per_shard_layers["a"]
    assert reason in canonical.per_shard_layers["a"]
    assert (canonical.records, canonical.fingerprint) == (in_parts.records, in_parts.fingerprint)
    assert not in_parts.per_shard_layers


def test_half_bytes_are_portable_where_no_byte_is_shared(pool: HostPool) -> None:
    """Eight heads of four bits side by side: four to a device fill two bytes, one alone does not fill any."""
    values = np.random.default_rng(0).integers(-8, 8, (6, 32, 8)).astype(jnp.int4)
    config = one_layer(FullAttentionSpec(4, 8, 4, jnp.int4))
    hints = {"a": LayoutHint(0, head_axis=2)}
    whole = as_bytes(values[3]).tobytes()
    for degree in (1, 2, 4, 8):
        sharding = NamedSharding(line_of(degree), PartitionSpec(None, None, "t"))
        caches: Any = {"a": put(values, sharding)}
        canonical = canonicalize(caches, config, hints, portable_pages=True)
        assert bool(canonical.per_shard_layers) == (degree == 8)
        parts = [as_bytes(part).tobytes() for part in np.split(values[3], degree, axis=1)]
        transfer = BlockTransfer(canonical, pool, backend="cpu")
        with transfer.reserve(GROUP, 1) as slots:
            assert transfer.offload(caches, GROUP, [3], slots).wait().error is None
            held = bytes(pool.view(slots[0])[: len(whole)])
            assert held == (b"".join(parts) if degree == 8 else whole)
            caches, ticket = transfer.restore(caches, GROUP, [0], slots)
            assert ticket.wait().error is None
        expected = values.copy()
        expected[0] = values[3]
        assert np.array_equal(np.array(caches["a"]), expected)


def test_layers_of_both_kinds_stand_side_by_side() -> None:
    case = MESH_CASES["gated_delta_net"]
    host = random_host(case, 0)

    def register_on(plan: MeshPlan) -> CanonicalKVCaches:
        return register(case, plan, host, portable_pages=True)[1]

    on_two, on_four = register_on(TENSOR_2), register_on(TENSOR_4)
    assert set(on_two.per_shard_layers) == {
        name for group in case.config.groups for name in group.layer_names
    }
    assert on_two.fingerprint != on_four.fingerprint
