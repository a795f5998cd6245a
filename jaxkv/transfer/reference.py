"""NumPy twin of the four ops, written from ``PagePlan`` alone: the oracle of the others. Slow on purpose.

Leaves are flat, writable ``uint8`` views of the leaves' memory. Writing ops change them in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxkv.host_pool import ADDRESS_UNIT_BYTES
from jaxkv.records import GroupPages
from jaxkv.transfer.status import make_status

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]
Status = npt.NDArray[np.int32]


def gather_pages(leaves: Sequence[Bytes], block_ids: Ids, pages: GroupPages) -> Bytes:
    """As ``jaxkv.transfer.ops.gather_pages``."""
    staging = np.zeros((len(block_ids), pages.record_bytes), np.uint8)
    for record, block in zip(staging, block_ids, strict=True):
        if 0 <= block < pages.num_blocks:
            _read_block(leaves, int(block), record, pages)
    return staging


def scatter_pages(staging: Bytes, block_ids: Ids, leaves: Sequence[Bytes], pages: GroupPages) -> Status:
    """As ``jaxkv.transfer.ops.scatter_pages``, in place; returns the status."""
    return _move_all(block_ids, list(staging), leaves, pages, writes_leaves=True)


def offload(
    pool: Bytes, leaves: Sequence[Bytes], block_ids: Ids, addresses: Ids, pages: GroupPages
) -> Status:
    """As ``jaxkv.transfer.ops.offload``, to a pool that is an array; returns the status."""
    return _move_all(block_ids, _records(pool, addresses, pages), leaves, pages, writes_leaves=False)


def restore(
    pool: Bytes, leaves: Sequence[Bytes], block_ids: Ids, addresses: Ids, pages: GroupPages
) -> Status:
    """As ``jaxkv.transfer.ops.restore``, from a pool that is an array, in place; returns the status."""
    return _move_all(block_ids, _records(pool, addresses, pages), leaves, pages, writes_leaves=True)


def _records(pool: Bytes, addresses: Ids, pages: GroupPages) -> list[Bytes | None]:
    starts = [int(address) * ADDRESS_UNIT_BYTES for address in addresses]
    last = pool.size - pages.record_bytes
    return [pool[start : start + pages.record_bytes] if 0 <= start <= last else None for start in starts]


def _move_all(
    block_ids: Ids,
    records: Sequence[Bytes | None],
    leaves: Sequence[Bytes],
    pages: GroupPages,
    *,
    writes_leaves: bool,
) -> Status:
    moved: list[int] = []
    refused: list[tuple[int, str]] = []
    for entry, (block, record) in enumerate(zip(map(int, block_ids), records, strict=True)):
        if block == -1:
            continue
        if not 0 <= block < pages.num_blocks:
            refused.append((entry, "bad_block"))
        elif record is None:
            refused.append((entry, "bad_address"))
        elif writes_leaves and block in moved:
            refused.append((entry, "repeated"))
        else:
            moved.append(block)
            if writes_leaves:
                _write_block(leaves, block, record, pages)
            else:
                record[pages.clear_from :] = 0
                _read_block(leaves, block, record, pages)
    counts = Counter(reason for _, reason in refused)
    return make_status(moved=len(moved), first_refused=refused[0][0] if refused else 0, **counts)


def _read_block(leaves: Sequence[Bytes], block: int, record: Bytes, pages: GroupPages) -> None:
    for leaf, at_leaf, at_record in _runs(block, pages):
        record[at_record] = leaves[leaf][at_leaf]


def _write_block(leaves: Sequence[Bytes], block: int, record: Bytes, pages: GroupPages) -> None:
    for leaf, at_leaf, at_record in _runs(block, pages):
        leaves[leaf][at_leaf] = record[at_record]


def _runs(block: int, pages: GroupPages) -> Iterator[tuple[int, slice, slice]]:
    """Every run of one block: which leaf (place in ``pages.leaves``), where in it, where in the record."""
    for placement in pages.placements:
        plan = placement.plan
        for o in range(plan.outer_count):
            for i in range(plan.inner_count):
                row, entry = divmod(block, plan.num_blocks // plan.num_rows)
                at_leaf = plan.leaf_offset + row * plan.row_stride + entry * plan.block_stride
                at_leaf += o * plan.outer_leaf_stride + i * plan.inner_leaf_stride
                at_record = plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride
                yield (
                    pages.leaves.index(placement.leaf),
                    slice(at_leaf, at_leaf + plan.run_bytes),
                    slice(at_record, at_record + plan.run_bytes),
                )
