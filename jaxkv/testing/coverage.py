"""Proof by counting that page plans touch every byte they should, once. Slow and plain; for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxkv.records import GroupPages


def check_coverage(pages: GroupPages, leaf_bytes: Sequence[int]) -> None:
    """Fail unless the group's runs tile its block record, and no leaf byte belongs to two blocks or layers.

    ``leaf_bytes[i]`` is the size of unique leaf ``i``; no run may leave its leaf.
    """
    touched = {leaf: np.zeros(leaf_bytes[leaf], np.uint8) for leaf in pages.leaves}
    for block in range(pages.num_blocks):
        record = np.zeros(pages.block_bytes, np.uint8)
        for placement in pages.placements:
            size = placement.plan.run_bytes
            for leaf_start, record_start in placement.plan.runs(block):
                _count(touched[placement.leaf], leaf_start, size, f"leaf {placement.leaf}")
                _count(record, record_start, size, "the record")
        if not record.all():
            raise AssertionError(
                f"block {block}: byte {int(np.argmin(record))} of the record is never written"
            )


def uncovered_bytes(pages: GroupPages, leaf: int, leaf_bytes: int) -> int:
    """Bytes of unique leaf ``leaf`` that no page of the group holds: padding, or another group's."""
    held = sum(p.plan.page_bytes for p in pages.placements if p.leaf == leaf) * pages.num_blocks
    return leaf_bytes - held


def _count(counts: np.ndarray[tuple[int], np.dtype[np.uint8]], start: int, size: int, where: str) -> None:
    if start < 0 or start + size > counts.size:
        raise AssertionError(f"bytes {start} to {start + size} leave {where}, which has {counts.size} bytes")
    span = counts[start : start + size]
    if span.any():
        raise AssertionError(f"byte {start + int(np.argmax(span))} of {where} is covered twice")
    span += 1
