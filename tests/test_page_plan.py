"""Strided copies against nested loops written out byte by byte: merged, cut and spread over several plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.page_plan import Loop, PagePlan, cut_loops, merge_loops, plan_loops

START = PagePlan(num_blocks=1, block_stride=0, run_bytes=1)
Moves = list[tuple[int, int]]
"""Leaf byte and page byte of every byte that is copied, in page order."""


def moves_of(loops: Sequence[Loop], run: int) -> Moves:
    moves = []
    for steps in itertools.product(*(range(loop.count) for loop in loops)):
        at_leaf = sum(step * loop.leaf_stride for step, loop in zip(steps, loops, strict=True))
        at_page = sum(step * loop.page_stride for step, loop in zip(steps, loops, strict=True))
        moves += [(at_leaf + i, at_page + i) for i in range(run)]
    return moves


def moves_of_plans(plans: Iterable[PagePlan], block: int = 0) -> Moves:
    return [
        (at_leaf + i, at_page + i)
        for plan in plans
        for at_leaf, at_page in plan.runs(block)
        for i in range(plan.run_bytes)
    ]


@st.composite
def axes_of_pages(draw: st.DrawFn) -> tuple[list[Loop], int]:
    """The axes of a page as loops, in random gaps on both sides, and the size of an element."""
    unit = draw(st.integers(1, 3))
    loops: list[Loop] = []
    leaf_span = page_span = unit
    for count in draw(st.lists(st.integers(1, 3), max_size=5)):
        leaf_gap, page_gap = (draw(st.sampled_from([0, 0, 1, 5])) for _ in range(2))
        loops.insert(0, Loop(count, leaf_span + leaf_gap, page_span + page_gap))
        leaf_span, page_span = count * (leaf_span + leaf_gap), count * (page_span + page_gap)
    return loops, unit


@settings(max_examples=200)
@given(axes_of_pages())
def test_merged_loops_copy_the_same_bytes(axes: tuple[list[Loop], int]) -> None:
    loops, unit = axes
    merged, run = merge_loops(loops, unit)
    assert moves_of(merged, run) == moves_of(loops, unit)
    assert all(loop.count > 1 for loop in merged)


@given(st.lists(st.integers(1, 4), max_size=5), st.integers(1, 3))
def test_axes_without_gaps_merge_to_one_run(counts: list[int], unit: int) -> None:
    strides = [unit * math.prod(counts[axis + 1 :]) for axis in range(len(counts))]
    loops = [Loop(count, stride, stride) for count, stride in zip(counts, strides, strict=True)]
    assert merge_loops(loops, unit) == ((), unit * math.prod(counts))


@settings(max_examples=200)
@given(axes_of_pages(), st.integers(0, 7), st.integers(0, 7))
def test_plans_of_any_number_of_loops_copy_the_same_bytes(
    axes: tuple[list[Loop], int], at_leaf: int, at_record: int
) -> None:
    loops, unit = axes
    start = PagePlan(1, 0, unit, leaf_offset=at_leaf, record_offset=at_record)
    plans = plan_loops(start, loops)
    expected = [(leaf + at_leaf, page + at_record) for leaf, page in moves_of(loops, unit)]
    assert moves_of_plans(plans) == expected
    assert len(plans) == math.prod(loop.count for loop in loops[:-2])


@settings(max_examples=200)
@given(axes_of_pages(), st.data())
def test_a_cut_copies_just_the_bytes_in_it(axes: tuple[list[Loop], int], data: st.DataObject) -> None:
    loops, unit = axes
    counts = [loop.count for loop in loops]
    dense = [
        Loop(loop.count, loop.leaf_stride, unit * math.prod(counts[axis + 1 :]))
        for axis, loop in enumerate(loops)
    ]
    merged, run = merge_loops(dense, unit)
    whole = moves_of(merged, run)
    start = data.draw(st.integers(0, len(whole) - 1))
    part = range(start, data.draw(st.integers(start + 1, len(whole))))
    found = cut_loops(merged, run, part)
    if found is None:
        cuts_runs = part.start % run or part.stop % run
        assert cuts_runs or len(merged) > 1
        assert part.start // run != (part.stop - 1) // run
        return
    at_leaf, cut, cut_run = found
    expected = [(leaf - at_leaf, page - part.start) for leaf, page in whole[part.start : part.stop]]
    assert moves_of(cut, cut_run) == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_blocks_stand_one_row_after_another(num_rows: int, per_row: int, offset: int) -> None:
    # Row-major entries of an array [rows, 3, blocks of a row, 2], of which the middle axis is another's.
    places = np.arange(num_rows * 3 * per_row * 2).reshape(num_rows, 3, per_row, 2)
    plan = PagePlan(
        num_blocks=num_rows * per_row,
        block_stride=2,
        run_bytes=2,
        leaf_offset=offset,
        num_rows=num_rows,
        row_stride=3 * per_row * 2,
    )
    starts = [plan.block_start(block) - offset for block in range(plan.num_blocks)]
    assert starts == places[:, 0, :, 0].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("plan", "page_bytes"),
    [(START, 1), (PagePlan(4, 8, 3, outer_count=5, inner_count=2), 30)],
)
def test_a_page_is_all_its_runs(plan: PagePlan, page_bytes: int) -> None:
    assert plan.page_bytes == page_bytes
    assert len(moves_of_plans([plan])) == page_bytes
