"""The copy of one page as strides. Knows numbers only, neither arrays nor specs.

A page is read and written as a two-level strided copy: ``outer_count`` times ``inner_count`` runs of
``run_bytes`` each, with strides of their own on the leaf's side and on the record's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final


@final
@dataclass(frozen=True, slots=True)
class PagePlan:
    """The copy of one page between a leaf and its place in a block record. All fields are bytes or counts.

    Blocks stand in ``num_rows`` rows of equally many: block ``b`` is entry ``b % n`` of row ``b // n`` with
    ``n = num_blocks // num_rows``, and begins at ``leaf_offset + (b // n) * row_stride +
    (b % n) * block_stride``. From there run ``(o, i)`` starts at ``o * outer_leaf_stride +
    i * inner_leaf_stride``, and in the record at ``record_offset + o * outer_page_stride +
    i * inner_page_stride``.
    """

    num_blocks: int
    block_stride: int
    run_bytes: int
    leaf_offset: int = 0
    record_offset: int = 0
    outer_count: int = 1
    outer_leaf_stride: int = 0
    outer_page_stride: int = 0
    inner_count: int = 1
    inner_leaf_stride: int = 0
    inner_page_stride: int = 0
    num_rows: int = 1
    row_stride: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.outer_count * self.inner_count * self.run_bytes

    def block_start(self, block: int) -> int:
        """Leaf byte at which ``block`` begins."""
        row, entry = divmod(block, self.num_blocks // self.num_rows)
        return self.leaf_offset + row * self.row_stride + entry * self.block_stride

    def runs(self, block: int) -> Iterator[tuple[int, int]]:
        """Leaf byte and record byte at which each run of ``block`` starts, in page order."""
        start = self.block_start(block)
        for o in range(self.outer_count):
            for i in range(self.inner_count):
                yield (
                    start + o * self.outer_leaf_stride + i * self.inner_leaf_stride,
                    self.record_offset + o * self.outer_page_stride + i * self.inner_page_stride,
                )


@final
@dataclass(frozen=True, slots=True)
class Loop:
    """``count`` steps with a stride on each side. Strides are in any one unit."""

    count: int
    leaf_stride: int
    page_stride: int


def merge_loops(loops: Sequence[Loop], unit: int) -> tuple[tuple[Loop, ...], int]:
    """The same copy in as few loops as can be, outermost first, and the length of its runs.

    ``unit`` is what the innermost of ``loops`` steps over: the size of one element.
    """
    merged: list[Loop] = []
    run = unit
    for loop in reversed(loops):
        if loop.count == 1:
            continue
        inner = merged[0] if merged else Loop(run // unit, unit, unit)
        span = (inner.count * inner.leaf_stride, inner.count * inner.page_stride)
        if (loop.leaf_stride, loop.page_stride) != span:
            merged.insert(0, loop)
        elif merged:
            merged[0] = replace(inner, count=inner.count * loop.count)
        else:
            run *= loop.count
    return tuple(merged), run


def cut_loops(loops: Sequence[Loop], run: int, part: range) -> tuple[int, tuple[Loop, ...], int] | None:
    """Where ``part`` of a page begins in its leaf, and the loops and runs that cover it.

    ``loops`` read the page, ``part`` counts in the same unit from its start. ``None`` if it cuts runs so that
    no strided copy covers it.
    """
    if len(part) == run * math.prod(loop.count for loop in loops):
        return 0, tuple(loops), run
    if not loops:
        return part.start, (), len(part)
    outer, inner = loops[0], loops[1:]
    step = run * math.prod(loop.count for loop in inner)
    first, within = divmod(part.start, step)
    if within + len(part) <= step:
        below = cut_loops(inner, run, range(within, within + len(part)))
        return below and (first * outer.leaf_stride + below[0], *below[1:])
    if within or len(part) % step:
        return None
    return first * outer.leaf_stride, (replace(outer, count=len(part) // step), *inner), run


def plan_loops(start: PagePlan, loops: Sequence[Loop]) -> list[PagePlan]:
    """Plans that copy ``loops`` of runs from where ``start`` begins: one, or several for more than two loops.

    Loops beyond the two of a plan are written out, so every layout has a plan.
    """
    if len(loops) > 2:
        outermost = loops[0]
        return [
            plan
            for step in range(outermost.count)
            for plan in plan_loops(
                replace(
                    start,
                    leaf_offset=start.leaf_offset + step * outermost.leaf_stride,
                    record_offset=start.record_offset + step * outermost.page_stride,
                ),
                loops[1:],
            )
        ]
    outer, inner = [Loop(1, 0, 0)] * (2 - len(loops)) + list(loops)
    return [
        replace(
            start,
            outer_count=outer.count,
            outer_leaf_stride=outer.leaf_stride,
            outer_page_stride=outer.page_stride,
            inner_count=inner.count,
            inner_leaf_stride=inner.leaf_stride,
            inner_page_stride=inner.page_stride,
        )
    ]
