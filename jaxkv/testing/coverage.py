"""Proof by counting that page plans touch every byte they should, once. Slow and plain; for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxkv.records import GroupPages, GroupRecord

Counts = np.ndarray[tuple[int], np.dtype[np.uint8]]


def check_coverage(pages: GroupPages, leaf_bytes: Sequence[int]) -> None:
    """Fail unless the group's runs tile its block record, and no leaf byte belongs to two blocks or layers.

    ``leaf_bytes[i]`` is the size of unique leaf ``i``; no run may leave its leaf.
    """
    touched = _zeros(pages, leaf_bytes)
    for block in range(pages.num_blocks):
        record = np.zeros(pages.block_bytes, np.uint8)
        _count_block(pages, block, touched, record)
        _require_full(record, f"block {block}")


def check_record_coverage(record: GroupRecord, leaf_bytes: Sequence[int]) -> None:
    """Fail unless what all devices write of a record tiles it, and each clears what it should.

    ``leaf_bytes[i]`` is what one device holds of unique leaf ``i``; no byte of it may belong to two blocks.
    """
    shards = [pages for part in record.parts for pages in part.shards]
    touched = [_zeros(pages, leaf_bytes) for pages in shards]
    for block in range(record.num_blocks):
        counts = np.zeros(record.record_bytes, np.uint8)
        for pages, of_shard in zip(shards, touched, strict=True):
            _count_block(pages, block, of_shard, counts)
            counts[pages.clear_from :] += 1
        _require_full(counts, f"block {block}")
        if counts.max() > 1:
            raise AssertionError(f"block {block}: byte {int(np.argmax(counts))} is written by two devices")


def uncovered_bytes(pages: GroupPages, leaf: int, leaf_bytes: int) -> int:
    """Bytes of unique leaf ``leaf`` that no page of the group holds: padding, or another group's."""
    held = sum(p.plan.page_bytes for p in pages.placements if p.leaf == leaf) * pages.num_blocks
    return leaf_bytes - held


def _zeros(pages: GroupPages, leaf_bytes: Sequence[int]) -> dict[int, Counts]:
    return {leaf: np.zeros(leaf_bytes[leaf], np.uint8) for leaf in pages.leaves}


def _count_block(pages: GroupPages, block: int, leaves: dict[int, Counts], record: Counts) -> None:
    for placement in pages.placements:
        size = placement.plan.run_bytes
        for leaf_start, record_start in placement.plan.runs(block):
            _count(leaves[placement.leaf], leaf_start, size, f"leaf {placement.leaf}")
            _count(record, record_start, size, "the record")


def _count(counts: Counts, start: int, size: int, where: str) -> None:
    if start < 0 or start + size > counts.size:
        raise AssertionError(f"bytes {start} to {start + size} leave {where}, which has {counts.size} bytes")
    span = counts[start : start + size]
    if span.any():
        raise AssertionError(f"byte {start + int(np.argmax(span))} of {where} is covered twice")
    span += 1


def _require_full(record: Counts, what: str) -> None:
    if not record.all():
        raise AssertionError(f"{what}: byte {int(np.argmin(record))} of the record is never written")
