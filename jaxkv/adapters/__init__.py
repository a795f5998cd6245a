"""For stacks that keep caches or tables of their own kind: what to register, and which block ids to pass.

Nothing here reads, writes or moves cache bytes.
"""

from jaxkv.adapters.dense import DenseCaches, describe_dense, set_row
from jaxkv.adapters.pools import block_table, map_slots, page_ids, split_drafts, state_ids

__all__ = [
    "DenseCaches",
    "block_table",
    "describe_dense",
    "map_slots",
    "page_ids",
    "set_row",
    "split_drafts",
    "state_ids",
]
