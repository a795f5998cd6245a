"""Page plans against NumPy slices of logical arrays, for random shapes and for the corner cases."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.layout import LayoutHint, plan_page, view_blocks, whole_cache_leaf
from jaxkv.testing import PageSlice, assert_same_bytes

DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn))


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


def stretch(shape, axis, kernel_blocks):
    """Bytes of the parts of one block that lie together: all behind the block axis."""
    return kernel_blocks * math.prod(shape[axis + 1 :])


@st.composite
def cut_leaves(draw):
    """A leaf of random shape, its hint, and a range of the block's bytes that a plan can express."""
    num_blocks = draw(st.integers(1, 5))
    kernel_blocks = draw(st.integers(1, 3))
    before = draw(st.lists(st.integers(1, 4), max_size=3))
    after = draw(st.lists(st.integers(1, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    leaf = leaf_of(*before, num_blocks * kernel_blocks, *after, dtype=dtype)
    hint = LayoutHint(block_axis=len(before), kernel_blocks_per_block=kernel_blocks)
    view = view_blocks(leaf, num_blocks, hint)
    run_bytes = stretch(leaf.shape, len(before), kernel_blocks) * dtype.itemsize
    num_runs = math.prod(before)
    if draw(st.booleans()):
        first = draw(st.integers(0, num_runs - 1))
        last = draw(st.integers(first + 1, num_runs))
        page = range(first * run_bytes, last * run_bytes)
    else:
        run = draw(st.integers(0, num_runs - 1)) * run_bytes
        start = draw(st.integers(0, run_bytes - 1))
        page = range(run + start, run + draw(st.integers(start + 1, run_bytes)))
    return leaf, hint, view, page


@settings(max_examples=400)
@given(cut_leaves(), st.integers(0, 9))
def test_gather_by_plan_equals_a_slice_of_the_logical_array(cut, record_offset):
    leaf, hint, view, page = cut
    plans = plan_page(leaf, view, page, record_offset)
    raw = np.random.default_rng(0).integers(0, 256, math.prod(leaf.shape) * leaf.dtype.itemsize, np.uint8)
    array = raw.view(leaf.dtype).reshape(leaf.shape)
    oracle = PageSlice(hint.block_axis, hint.kernel_blocks_per_block, page.start, page.stop)
    for block in range(view.num_blocks):
        record = gather(plans, raw, block)
        assert_same_bytes(record[record_offset:], oracle.read(array, block))
        assert (record[:record_offset] == 0xEE).all()


@settings(max_examples=200)
@given(cut_leaves())
def test_runs_of_all_blocks_touch_each_byte_of_the_leaf_once(cut):
    leaf, _, view, _ = cut
    (plan,) = plan_page(leaf, view, range(view.block_bytes), 0)
    touched = np.zeros(math.prod(leaf.shape) * leaf.dtype.itemsize, np.uint8)
    for block in range(view.num_blocks):
        for leaf_start, _ in plan.runs(block):
            touched[leaf_start : leaf_start + plan.run_bytes] += 1
    assert (touched == 1).all()


@given(cut_leaves())
def test_a_contiguous_page_is_one_run(cut):
    leaf, hint, view, _ = cut
    (plan,) = plan_page(leaf, view, range(view.block_bytes), 0)
    contiguous = math.prod(leaf.shape[: hint.block_axis]) == 1 or view.num_blocks == 1
    assert (plan.outer_count * plan.inner_count == 1) == contiguous


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


def test_packed_half_bytes_count_as_half():
    leaf = leaf_of(5, 3, 6, dtype=jnp.int4)
    view = view_blocks(leaf, 5, LayoutHint())
    (plan,) = plan_page(leaf, view, range(view.block_bytes), 0)
    assert (plan.outer_count * plan.inner_count, plan.run_bytes) == (1, 9)


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
    ("values", "message"),
    [
        ({"block_axis": -1}, "block_axis must be 'auto', 0, 1, ... or two of these, got -1"),
        ({"block_axis": "first"}, "got 'first'"),
        ({"kernel_blocks_per_block": 0}, "kernel_blocks_per_block must be at least 1, got 0"),
        ({"page_offset_bytes": -8}, "page_offset_bytes must not be negative, got -8"),
        ({"page_size_bytes": 0}, "page_size_bytes must be at least 1, got 0"),
        ({"block_axis": (1, 1)}, r"two of these, got \(1, 1\)"),
        ({"block_axis": (0, 1, 2)}, r"two of these, got \(0, 1, 2\)"),
        ({"block_axis": ()}, r"two of these, got \(\)"),
        ({"block_axis": 0, "head_axis": 0}, "head_axis 0 is a block axis already"),
        ({"head_copies": 2}, "head_copies needs head_axis"),
        ({"head_axis": 1, "head_copies": 0}, "head_copies must be at least 1, got 0"),
        ({"head_axis": -1}, "head_axis must be 0, 1, ..., got -1"),
    ],
)
def test_a_hint_that_cannot_work_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LayoutHint(**values)
