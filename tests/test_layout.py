"""Page plans against NumPy slices of logical arrays, for random shapes and for the corner cases."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.layout import (
    CacheLeaf,
    LayoutHint,
    plan_page,
    plan_shard,
    shares_whole_bytes,
    view_blocks,
    whole_cache_leaf,
)
from jaxkv.sharding import LeafShards
from jaxkv.testing import PageSlice, assert_same_bytes
from jaxkv.testing.arrays import as_bytes, from_bytes

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.int4, jnp.uint2)


def leaf_of(*shape, dtype=np.float32):
    return whole_cache_leaf("layer 'x', leaf 0", shape, np.dtype(dtype))


def gather(plans, raw, block):
    """The block's page, copied run by run as the plans say; every other record byte stays 0xEE."""
    start = min(plan.record_offset for plan in plans)
    record = np.full(start + sum(plan.page_bytes for plan in plans), 0xEE, np.uint8)
    for plan in plans:
        for at_leaf, at_record in plan.runs(block):
            record[at_record : at_record + plan.run_bytes] = raw[at_leaf : at_leaf + plan.run_bytes]
    return record


def random_array(leaf):
    """An array of random bits like ``leaf``."""
    num_bytes = math.prod(leaf.shape) * leaf.element_bits // 8
    raw = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    return from_bytes(raw.tobytes(), leaf.dtype, leaf.shape)


@st.composite
def blocked_leaves(draw, max_parts=1):
    """A leaf of random shape and dtype, its hint, and the same as a NumPy slice of the logical array.

    Blocks stand along one axis or in rows, in one entry or several. Another axis is split into parts.
    """
    kernel_blocks = draw(st.integers(1, 3))
    in_rows = draw(st.booleans())
    blocks_per_row, num_rows = draw(st.integers(1, 4)), draw(st.integers(1, 3)) if in_rows else 1
    parts = draw(st.integers(min(2, max_parts), max_parts))
    named = {"entry": blocks_per_row * kernel_blocks}
    named |= {"row": num_rows} if in_rows else {}
    named |= {"split": parts * draw(st.integers(1, 3))} if parts > 1 else {}
    order = draw(st.permutations([*named, *draw(st.lists(st.integers(1, 4), max_size=3))]))
    at = {name: order.index(name) for name in named}
    shape = tuple(named.get(size, size) for size in order)
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    grid = tuple(parts if axis == at.get("split") else 1 for axis in range(len(shape)))
    leaf = CacheLeaf("layer 'x', leaf 0", shape, dtype, LeafShards(grid))
    hint = LayoutHint((at["row"], at["entry"]) if in_rows else at["entry"], kernel_blocks)
    page = PageSlice(at["entry"], kernel_blocks, row_axis=at.get("row"), split_axis=at.get("split"))
    return leaf, num_rows * blocks_per_row, hint, page


def view_or_assume(leaf, num_blocks, hint):
    """The view; another example where runs are no whole bytes, which is refused."""
    try:
        return view_blocks(leaf, num_blocks, hint)
    except CacheMismatchError as error:
        assume("which are not whole bytes" not in str(error))
        raise


@settings(max_examples=200)
@given(blocked_leaves(), st.integers(0, 9))
def test_gather_by_plan_equals_a_slice_of_the_logical_array(blocked, record_offset):
    leaf, num_blocks, hint, page = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    array = random_array(leaf)
    plans = plan_page(leaf, view, range(view.block_bytes), record_offset)
    for block in range(num_blocks):
        record = gather(plans, as_bytes(array), block)
        assert_same_bytes(record[record_offset:], page.read(array, block))
        assert (record[:record_offset] == 0xEE).all()


@settings(max_examples=200)
@given(blocked_leaves(), st.data())
def test_a_part_of_a_page_that_is_planned_reads_just_its_bytes(blocked, data):
    leaf, num_blocks, hint, page = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    start = data.draw(st.integers(0, view.block_bytes - 1))
    part = range(start, data.draw(st.integers(start + 1, view.block_bytes)))
    array = random_array(leaf)
    try:
        plans = plan_page(leaf, view, part, 0)
    except CacheMismatchError as error:
        assume("cut its runs" not in str(error))
        raise
    for block in range(num_blocks):
        expected = page.read(array, block)[part.start : part.stop]
        assert_same_bytes(gather(plans, as_bytes(array), block), expected)


@settings(max_examples=200)
@given(blocked_leaves())
def test_runs_of_all_blocks_touch_each_byte_of_the_leaf_once(blocked):
    leaf, num_blocks, hint, _ = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    touched = np.zeros(num_blocks * view.block_bytes, np.uint8)
    for plan in plan_page(leaf, view, range(view.block_bytes), 0):
        for block in range(num_blocks):
            for leaf_start, _ in plan.runs(block):
                touched[leaf_start : leaf_start + plan.run_bytes] += 1
    assert (touched == 1).all()


@given(blocked_leaves())
def test_exactly_a_contiguous_page_is_one_run(blocked):
    leaf, num_blocks, hint, page = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    (plan,) = plan_page(leaf, view, range(view.block_bytes), 0)
    places = np.arange(math.prod(leaf.shape), dtype=np.int32).reshape(leaf.shape)
    page_places = np.frombuffer(page.read(places, num_blocks - 1), np.int32)
    assert (plan.outer_count * plan.inner_count == 1) == (np.diff(page_places) == 1).all()


# -- parts that several devices hold ------------------------------------------------------------------------


@settings(max_examples=150)
@given(blocked_leaves(max_parts=3))
def test_a_device_reads_the_page_of_its_own_part(blocked):
    leaf, num_blocks, hint, page = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    parts = page.parts(random_array(leaf), view.num_shards)
    plans = plan_page(leaf, view, range(view.block_bytes), 0)
    for part in parts:
        for block in range(num_blocks):
            assert_same_bytes(gather(plans, as_bytes(part), block), page.read(part, block))


@settings(max_examples=150)
@given(blocked_leaves(max_parts=3), st.integers(0, 9))
def test_parts_of_all_devices_make_up_the_page_of_the_whole_array(blocked, record_offset):
    leaf, num_blocks, hint, page = blocked
    view = view_or_assume(leaf, num_blocks, hint)
    assume(shares_whole_bytes(view))
    array = random_array(leaf)
    parts = [as_bytes(part) for part in page.parts(array, view.num_shards)]
    plans = [plan_shard(view, shard, record_offset) for shard in range(view.num_shards)]
    for block in range(num_blocks):
        page_bytes = view.num_shards * view.block_bytes
        written = np.zeros(record_offset + page_bytes, np.uint8)
        record = np.full_like(written, 0xEE)
        for raw, of_shard in zip(parts, plans, strict=True):
            for plan in of_shard:
                for at_leaf, at_record in plan.runs(block):
                    into = slice(at_record, at_record + plan.run_bytes)
                    record[into] = raw[at_leaf : at_leaf + plan.run_bytes]
                    written[into] += 1
        assert (written[record_offset:] == 1).all()
        assert not written[:record_offset].any()
        assert_same_bytes(record[record_offset:], page.read(array, block))


def test_parts_of_two_devices_in_one_byte_are_known_for_that():
    grid = LeafShards((1, 1, 2))
    packed = CacheLeaf("layer 'x', leaf 0", (5, 4, 2), np.dtype(jnp.int4), grid)
    whole = CacheLeaf("layer 'x', leaf 0", (5, 4, 4), np.dtype(jnp.int4), grid)
    assert not shares_whole_bytes(view_blocks(packed, 5, LayoutHint(0)))
    assert shares_whole_bytes(view_blocks(whole, 5, LayoutHint(0)))


# -- corner cases -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 6))
def test_auto_takes_the_one_axis_of_the_right_size_and_nothing_else(shape, num_blocks):
    leaf = leaf_of(*shape)
    if shape.count(num_blocks) == 1:
        axis = shape.index(num_blocks)
        assert view_blocks(leaf, num_blocks, LayoutHint()) == view_blocks(leaf, num_blocks, LayoutHint(axis))
    else:
        with pytest.raises(CacheMismatchError, match=r"LayoutHint\(block_axis=...\)"):
            view_blocks(leaf, num_blocks, LayoutHint())


@pytest.mark.parametrize("start", range(14))
def test_a_range_is_planned_exactly_when_it_lies_in_one_run_or_covers_whole_runs(start):
    leaf = leaf_of(3, 5, 7, dtype=np.int8)
    view = view_blocks(leaf, 5, LayoutHint())
    for stop in range(start + 1, 22):
        in_one_run = start // 7 == (stop - 1) // 7
        whole_runs = start % 7 == 0 and stop % 7 == 0
        if in_one_run or whole_runs:
            (plan,) = plan_page(leaf, view, range(start, stop), 0)
            assert plan.page_bytes == stop - start
        else:
            with pytest.raises(CacheMismatchError, match="cut its runs of 7 bytes"):
                plan_page(leaf, view, range(start, stop), 0)


def test_bytes_past_the_end_of_a_block_are_refused():
    leaf = leaf_of(5, 3, dtype=np.int8)
    with pytest.raises(CacheMismatchError, match="bytes 1 to 4 were asked for, but a block has 3"):
        plan_page(leaf, view_blocks(leaf, 5, LayoutHint()), range(1, 4), 0)


@pytest.mark.parametrize(("dtype", "run_bytes"), [(jnp.int4, 10), (jnp.uint2, 5), (jnp.float4_e2m1fn, 10)])
def test_packed_elements_count_by_their_bits(dtype, run_bytes):
    leaf = leaf_of(5, 4, 5, dtype=dtype)
    view = view_blocks(leaf, 5, LayoutHint(0))
    (plan,) = plan_page(leaf, view, range(view.block_bytes), 0)
    assert (plan.outer_count * plan.inner_count, plan.run_bytes) == (1, run_bytes)


def test_runs_that_are_not_whole_bytes_are_refused():
    with pytest.raises(CacheMismatchError, match="runs of 12 bits, which are not whole bytes"):
        view_blocks(leaf_of(5, 3, dtype=jnp.int4), 5, LayoutHint())


def test_a_leaf_without_bytes_is_refused():
    with pytest.raises(CacheMismatchError, match="holds no bytes"):
        view_blocks(leaf_of(5, 0, 3), 5, LayoutHint())


def test_portable_views_of_one_page_are_equal_whatever_the_block_axis():
    first = view_blocks(leaf_of(2, 5, 4, 3), 5, LayoutHint())
    second = view_blocks(leaf_of(5, 2, 4, 3), 5, LayoutHint())
    assert first.page_shape == second.page_shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("shape", "hint", "message"),
    [
        ((2, 6, 3), LayoutHint((0, 1), 2), "has size 2 x 6, expected 16 .* in whole blocks to a row"),
        ((4, 4, 3), LayoutHint((0, 1), 8), "has size 4 x 4, expected 64"),
        ((16, 1, 3), LayoutHint((0, 1), 2), "has size 16 x 1, expected 16 .* in whole blocks to a row"),
        ((8, 3), LayoutHint((0, 2)), "has rank 2, but its LayoutHint names block axis 2"),
        ((8, 3), LayoutHint((3, 0)), "has rank 2, but its LayoutHint names block axis 3"),
    ],
)
def test_rows_that_do_not_hold_whole_blocks_are_refused(shape, hint, message):
    with pytest.raises(CacheMismatchError, match=message):
        view_blocks(leaf_of(*shape), 8, hint)


def test_blocks_of_a_row_that_lie_on_several_devices_are_refused():
    leaf = CacheLeaf("layer 'x', leaf 0", (4, 16, 3), np.dtype(np.float32), LeafShards((1, 2, 1)))
    with pytest.raises(CacheMismatchError, match=r"axis 1, .* is split over devices; split axis 0 instead"):
        view_blocks(leaf, 16, LayoutHint((0, 1), 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_axis": -1}, "block_axis must be 'auto', 0, 1, ... or two of these, got -1"),
        ({"block_axis": "first"}, "got 'first'"),
        ({"block_axis": None}, "block_axis must be .* got None"),
        ({"block_axis": 0.0}, "block_axis must be .* got 0.0"),
        ({"block_axis": (0, 1.0)}, r"block_axis must be .* got \(0, 1.0\)"),
        ({"block_axis": [0, 1]}, r"block_axis must be .* got \[0, 1\]"),
        ({"kernel_blocks_per_block": 0}, "kernel_blocks_per_block must be .* at least 1, got 0"),
        ({"kernel_blocks_per_block": 2.0}, "kernel_blocks_per_block must be .* got 2.0"),
        ({"page_offset_bytes": -8}, "page_offset_bytes must be .* got -8"),
        ({"page_offset_bytes": None}, "page_offset_bytes must be .* got None"),
        ({"page_size_bytes": 0}, "page_size_bytes must be .* at least 1, got 0"),
        ({"page_size_bytes": 1.5}, "page_size_bytes must be .* got 1.5"),
        ({"block_axis": (1, 1)}, r"two of these, got \(1, 1\)"),
        ({"block_axis": (0, 1, 2)}, r"two of these, got \(0, 1, 2\)"),
        ({"block_axis": ()}, r"two of these, got \(\)"),
        ({"block_axis": 0, "head_axis": 0}, "head_axis 0 is a block axis already"),
        ({"head_copies": 2}, "head_copies needs head_axis"),
        ({"head_axis": 1, "head_copies": 0}, "head_copies must be .* at least 1, got 0"),
        ({"head_axis": 1, "head_copies": "2"}, "head_copies must be .* got '2'"),
        ({"head_axis": -1}, "head_axis must be .* got -1"),
        ({"head_axis": "1"}, "head_axis must be .* got '1'"),
    ],
)
def test_a_hint_that_cannot_work_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LayoutHint(**values)
