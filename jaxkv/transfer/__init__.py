"""Moves pages between cache leaves and the host pool: page ops, pool ops and `BlockTransfer`."""

from jaxkv.transfer.block_transfer import BlockTransfer, SlotLease
from jaxkv.transfer.ops import gather_pages, offload, restore, scatter_pages
from jaxkv.transfer.ticket import Ticket, TransferResult

__all__ = [
    "BlockTransfer",
    "SlotLease",
    "Ticket",
    "TransferResult",
    "gather_pages",
    "offload",
    "restore",
    "scatter_pages",
]
