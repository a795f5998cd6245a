"""Where the bytes of one block lie inside one cache leaf. Knows shapes and strides; copies nothing.

A page is the bytes of one block in one leaf, in row-major order of the leaf with the block axis taken out.
It is read and written as a two-level strided copy: ``outer_count`` times ``inner_count`` runs of
``run_bytes`` each, with strides of their own on the leaf's side and on the page's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class PagePlan:
    """The copy of one page between a leaf and its place in a block record. All fields are bytes or counts.

    Run ``(o, i)`` of block ``b`` starts at leaf byte
    ``leaf_offset + b * block_stride + o * outer_leaf_stride + i * inner_leaf_stride`` and at record byte
    ``record_offset + o * outer_page_stride + i * inner_page_stride``.
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

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.outer_count * self.inner_count * self.run_bytes
