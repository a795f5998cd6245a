"""The pure page ops against the NumPy reference, eager and inside a caller's own programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.errors import BlockIdError, CacheMismatchError
from jaxkv.keys import GroupId
from jaxkv.page_plan import PagePlan
from jaxkv.records import GroupPages, PagePlacement
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_bytes, layout_case
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import ops, reference, xla_ops
from jaxkv.transfer.status import StatusEntry, explain_refusals, make_status

pytestmark = pytest.mark.usefixtures("platform")

OPS = pytest.mark.parametrize("ops_of", [ops, xla_ops], ids=["compiled", "xla"])
XLA_CASES = (
    *("packed_kv", "head_major", "block_axis_last", "kernel_blocks_of_split_kv"),
    *("float4_scales_float8_e8m0fnu", "mamba_two_dtypes", "layers_in_padded_rows", "dense_scales"),
)
"""One of each kind of plan. Transfers run all layouts with these ops."""
BLOCK_IDS = np.array([3, -1, 0, 5, 99, -7], np.int32)


def group_of(case: LayoutCase, seed: int = 1, group: int = 0) -> tuple[list[jax.Array], GroupPages]:
    kv_caches = case.build(seed)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    return canonical.group_leaves(kv_caches, GroupId(group)), canonical.groups[group]


def host_bytes(leaves: list[jax.Array]) -> list[np.ndarray]:
    return [as_bytes(leaf).copy() for leaf in leaves]


def counts(status: jax.Array) -> dict[str, int]:
    """The non-zero counts of a status."""
    named = zip(StatusEntry, np.array(status), strict=True)
    return {entry.name: int(n) for entry, n in named if n and entry < StatusEntry.FIRST_REFUSED}


@pytest.mark.parametrize(
    ("ops_of", "case"),
    [
        *(pytest.param(ops, case, id=f"compiled-{case}") for case in LAYOUT_CASES),
        *(pytest.param(xla_ops, layout_case(name), id=f"xla-{name}") for name in XLA_CASES),
    ],
)
def test_gather_and_scatter_equal_the_reference(case: LayoutCase, ops_of: Any) -> None:
    leaves, pages = group_of(case)
    source, _ = group_of(case, seed=2)
    ids = np.append(BLOCK_IDS, np.int32(0))
    staging = reference.gather_pages(host_bytes(source), np.array([2, 1, 0, 3, 0, 1, 2], np.int32), pages)
    expected = host_bytes(leaves)
    expected_records = reference.gather_pages(expected, ids, pages)
    expected_status = reference.scatter_pages(staging, ids, expected, pages)

    @jax.jit
    def run(staging: jax.Array, ids: jax.Array, leaves: list[jax.Array]) -> Any:
        return ops_of.gather_pages(leaves, ids, pages), ops_of.scatter_pages(staging, ids, leaves, pages)

    records, (written, status) = run(staging, ids, leaves)
    assert records.shape == (len(ids), pages.record_bytes)
    assert_same_bytes(records, expected_records)
    assert status[: StatusEntry.ELAPSED_US].tolist() == expected_status[: StatusEntry.ELAPSED_US].tolist()
    for leaf, like, wanted in zip(written, leaves, expected, strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert_same_bytes(leaf, wanted)


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="XLA drops the barrier too early")
@pytest.mark.parametrize("platform", ["cpu"], indirect=True)  # tests/gpu_compiler has it for a GPU
@OPS
def test_a_gather_that_a_barrier_puts_before_a_write_copies_no_leaf(ops_of: Any) -> None:
    leaves, pages = group_of(layout_case("wide_pages"))

    def step(barred: bool, block: jax.Array, leaves: list[jax.Array]) -> Any:
        records = ops_of.gather_pages(leaves, block[None], pages)
        if barred:
            records, leaves = jax.lax.optimization_barrier((records, leaves))
        return records, [leaf.at[block].set(1) for leaf in leaves]

    def temporary_bytes(*, barred: bool) -> int:
        lowered = jax.jit(step, static_argnums=0, donate_argnums=2).lower(barred, jnp.int32(1), leaves)
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)

    assert temporary_bytes(barred=True) < leaves[0].nbytes < temporary_bytes(barred=False)


def test_undonated_leaves_survive_a_scatter() -> None:
    leaves, pages = group_of(layout_case("packed_kv"))
    before = host_bytes(leaves)
    staging = jnp.zeros((1, pages.record_bytes), jnp.uint8)
    ops.scatter_pages(staging, jnp.zeros(1, jnp.int32), leaves, pages)
    for leaf, old in zip(leaves, before, strict=True):
        assert_same_bytes(leaf, old)


def test_page_ops_run_in_a_scan() -> None:
    leaves, pages = group_of(layout_case("packed_kv"))
    expected = host_bytes(leaves)

    def shift(carry: list[jax.Array], block: jax.Array) -> tuple[list[jax.Array], None]:
        staging = ops.gather_pages(carry, block[None], pages)
        return ops.scatter_pages(staging, block[None] + 1, carry, pages)[0], None

    shifted, _ = jax.jit(lambda xs: jax.lax.scan(shift, xs, jnp.arange(5, dtype=jnp.int32)))(leaves)
    for block in range(5):
        staging = reference.gather_pages(expected, np.array([block], np.int32), pages)
        reference.scatter_pages(staging, np.array([block + 1], np.int32), expected, pages)
    for leaf, wanted in zip(shifted, expected, strict=True):
        assert_same_bytes(leaf, wanted)


def plan_that(**changes: int) -> PagePlan:
    return PagePlan(**{"num_blocks": 4, "block_stride": 16, "run_bytes": 16} | changes)


@pytest.mark.parametrize(
    "plan",
    [
        plan_that(num_blocks=5),
        plan_that(run_bytes=17),
        plan_that(run_bytes=0),
        plan_that(run_bytes=-16),
        plan_that(block_stride=-16),
        plan_that(leaf_offset=1),
        plan_that(leaf_offset=-1),
        plan_that(record_offset=497),
        plan_that(record_offset=-1),
        plan_that(outer_count=0),
        plan_that(outer_count=2, outer_leaf_stride=2**62),
        plan_that(inner_count=2**62, inner_leaf_stride=0),
        plan_that(inner_count=2, inner_leaf_stride=64),
        plan_that(inner_count=2, inner_page_stride=2**62),
        plan_that(num_blocks=2**62, block_stride=2**62),
        plan_that(num_blocks=2**62, block_stride=0),
        plan_that(num_blocks=2, block_stride=15),
        plan_that(num_rows=0),
        plan_that(num_rows=-1),
        plan_that(num_rows=3),
        plan_that(num_rows=2, row_stride=33),
        plan_that(num_rows=2, row_stride=15),
        plan_that(num_rows=2, row_stride=-32),
        plan_that(num_rows=2, row_stride=2**62),
    ],
    ids=str,
)
def test_plans_that_leave_the_leaf_or_the_record_are_refused_and_nothing_moves(
    plan: PagePlan, placed: Callable[..., GroupPages]
) -> None:
    pages = placed(plan)
    leaf = jnp.arange(64, dtype=jnp.uint8)
    staging = jnp.full((1, 512), 255, jnp.uint8)
    (written,), status = ops.scatter_pages(staging, jnp.zeros(1, jnp.int32), [leaf], pages)
    assert counts(status) == {"BAD_GEOMETRY": 1}
    assert_same_bytes(written, leaf)
    assert not ops.gather_pages([leaf], jnp.zeros(1, jnp.int32), pages).any()


def test_pages_that_do_not_fit_one_record_together_are_refused(placed: Callable[..., GroupPages]) -> None:
    leaf = jnp.arange(64, dtype=jnp.uint8)
    half = pages_of(plan_that(outer_count=16), 2, block_bytes=512)
    for pages, status in ((half, {"MOVED": 1}), (huge_pages(), {"BAD_GEOMETRY": 1})):
        staging = jnp.zeros((1, min(pages.record_bytes, 512)), jnp.uint8)
        assert counts(ops.scatter_pages(staging, jnp.zeros(1, jnp.int32), [leaf], pages)[1]) == status


def huge_pages() -> GroupPages:
    """Each plan fits its record, but the sum of their bytes is more than 64 bits hold."""
    plan = plan_that(run_bytes=1, outer_count=2**62)
    return pages_of(plan, 3, block_bytes=16, record_bytes=2**63 - 1)


def pages_of(
    plan: PagePlan,
    count: int,
    *,
    block_bytes: int,
    record_bytes: int = 512,
    leaf_shape: tuple[int, ...] = (64,),
) -> GroupPages:
    """``count`` copies of one plan, of a leaf that is a flat array of bytes unless said otherwise."""
    placements = (PagePlacement(0, plan),) * count
    return GroupPages(
        plan.num_blocks, placements, (0,), (leaf_shape,), ((0,),), block_bytes, record_bytes, block_bytes
    )


@OPS
def test_no_ids_move_nothing(ops_of: Any) -> None:
    leaves, pages = group_of(layout_case("packed_kv"))
    no_ids = jnp.zeros(0, jnp.int32)
    staging = ops_of.gather_pages(leaves, no_ids, pages)
    assert staging.shape == (0, pages.record_bytes)
    written, status = ops_of.scatter_pages(staging, no_ids, leaves, pages)
    assert counts(status) == {}
    for leaf, old in zip(written, leaves, strict=True):
        assert_same_bytes(leaf, old)


def test_the_largest_plan_that_fits_is_taken(placed: Callable[..., GroupPages]) -> None:
    pages = placed(plan_that(record_offset=496))
    leaf = jnp.arange(64, dtype=jnp.uint8)
    record = np.array(ops.gather_pages([leaf], jnp.array([3], jnp.int32), pages))[0]
    assert_same_bytes(record[496:], np.arange(48, 64, dtype=np.uint8))
    assert not record[:496].any()


@pytest.mark.parametrize(("shape", "refused"), [((1, 512), 1), ((2, 511), 2), ((0, 512), 2)])
def test_entries_without_a_whole_record_in_the_staging_array_are_refused(
    shape: tuple[int, int], refused: int, placed: Callable[..., GroupPages]
) -> None:
    staging = jnp.zeros(shape, jnp.uint8)
    leaf = jnp.arange(64, dtype=jnp.uint8)
    _, status = ops.scatter_pages(staging, jnp.arange(2, dtype=jnp.int32), [leaf], placed(plan_that()))
    assert counts(status).get("BAD_ADDRESS", 0) == refused


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.float4_e2m1fn], ids=str)
@OPS
def test_leaves_of_less_than_a_byte_per_element_are_read_packed(
    dtype: Any, ops_of: Any, placed: Callable[..., GroupPages]
) -> None:
    pages = placed(PagePlan(num_blocks=8, block_stride=32, run_bytes=32), (8, 64))
    packed = np.random.default_rng(0).integers(0, 256, (8, 32), dtype=np.uint8)
    leaf = jax.lax.bitcast_convert_type(jnp.array(packed), dtype).reshape(8, 64)
    other = jax.lax.bitcast_convert_type(jnp.array(~packed), dtype).reshape(8, 64)
    ids = np.array([7, 0], np.int32)
    staging = jax.jit(lambda i, x: ops_of.gather_pages([x], i, pages))(ids, leaf)
    assert_same_bytes(np.array(staging)[:, :32], packed[[7, 0]])
    (written,), _ = jax.jit(lambda s, i, x: ops_of.scatter_pages(s, i, [x], pages))(staging, ids, other)
    expected = ~packed
    expected[[7, 0]] = packed[[7, 0]]
    unpacked = jax.lax.bitcast_convert_type(written.reshape(8, 32, 2), jnp.uint8)
    assert_same_bytes(unpacked, expected)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.float4_e2m1fn, jnp.int2], ids=str)
def test_the_size_of_a_packed_leaf_is_counted_in_bits(dtype: Any, placed: Callable[..., GroupPages]) -> None:
    # 128 elements: 128 bytes to FFI, half of that or less in memory.
    leaf = jnp.zeros(128, dtype)
    staging = jnp.full((1, 512), 255, jnp.uint8)
    pages = placed(plan_that(num_blocks=8), (128,))
    (written,), status = ops.scatter_pages(staging, jnp.array([7], jnp.int32), [leaf], pages)
    assert counts(status) == {"BAD_GEOMETRY": 1}
    assert not np.array(written).astype(np.float32).any()


def test_ids_that_are_no_int32_vector_are_an_error() -> None:
    leaves, pages = group_of(layout_case("packed_kv"))
    with pytest.raises(BlockIdError, match="block_ids must be int32 of shape"):
        ops.gather_pages(leaves, jnp.zeros((1, 1), jnp.int32), pages)
    with pytest.raises(BlockIdError, match="block_ids must be int32 of shape"):
        ops.gather_pages(leaves, jnp.zeros(1, jnp.float32), pages)


def test_too_few_leaves_are_an_error() -> None:
    leaves, pages = group_of(layout_case("packed_kv"))
    with pytest.raises(CacheMismatchError, match="has 2 leaves, got 1"):
        ops.gather_pages(leaves[:1], jnp.zeros(1, jnp.int32), pages)


def test_a_complex_leaf_is_refused_by_the_xla_ops(placed: Callable[..., GroupPages]) -> None:
    pages = placed(plan_that())
    with pytest.raises(CacheMismatchError, match="use backend='cpu'"):
        xla_ops.gather_pages([jnp.zeros(8, jnp.complex64)], jnp.zeros(1, jnp.int32), pages)


def test_refusals_are_explained_in_words() -> None:
    ids = np.array([4, 99], np.int32)
    assert explain_refusals(make_status(moved=3).tolist(), ids) is None
    text = explain_refusals(make_status(bad_block=2, no_pool=1, first_refused=1).tolist(), ids)
    assert text == (
        "blocks refused: 2 x block id outside the group, 1 x host pool closed, unknown or of another process"
        "; the first is block_ids[1], block 99"
    )


@pytest.fixture
def placed() -> Callable[..., GroupPages]:
    def place(plan: PagePlan, leaf_shape: tuple[int, ...] = (64,)) -> GroupPages:
        return pages_of(plan, 1, block_bytes=min(max(plan.run_bytes, 0), 512), leaf_shape=leaf_shape)

    return place
