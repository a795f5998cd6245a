"""Block ids from the tables of serving stacks that keep their own pools. Knows indices, no arrays of bytes.

SGLang and its kin address a cache by token slots: slot ``p * page_size + i`` is token ``i`` of page ``p``. A
page is a block, so block ids are all that jaxkv needs. -1 in the answers means that there is nothing to move,
which is how ``BlockTransfer`` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from jaxkv.errors import BlockIdError, ConfigError
from jaxkv.keys import BlockId
from jaxkv.spec import MambaSpec


def page_ids(token_slots: ArrayLike, page_size: int, *, num_reserved: int = 0) -> npt.NDArray[np.int32]:
    """The page of every ``page_size`` token slots: ``int32[len(token_slots) // page_size]``.

    ``token_slots`` are those of one request in token order, from a page boundary on and in whole pages:
    a row of ``req_to_token`` without its last, unfinished page. A page with a negative slot is -1: it is no
    longer held whole. The first ``num_reserved`` pages are dummies that padding is written to.

    Raises ``BlockIdError`` for slots that are not whole aligned pages, and for a reserved page.
    """
    slots = _as_indices(token_slots, "token_slots")
    if page_size < 1:
        raise ConfigError(f"page_size must be at least 1, got {page_size}")
    if slots.size % page_size:
        whole = slots.size - slots.size % page_size
        raise BlockIdError(
            f"{slots.size} token slots are not whole pages of {page_size}; pass the first {whole}, "
            "the page behind them is not complete"
        )
    by_page = slots.reshape(-1, page_size)
    held = (by_page >= 0).all(axis=1)
    first = by_page[:, :1]
    torn = held & ((first[:, 0] % page_size != 0) | (by_page != first + np.arange(page_size)).any(axis=1))
    if torn.any():
        at = int(np.flatnonzero(torn)[0])
        raise BlockIdError(
            f"token slots {by_page[at].tolist()} (tokens {at * page_size} to {(at + 1) * page_size - 1}) are "
            f"not one page of {page_size}; begin at a page boundary of the request, in token order"
        )
    pages = np.where(held, first[:, 0] // page_size, -1).astype(np.int32)
    _require_not_reserved(pages, num_reserved)
    return pages


def map_slots(token_slots: ArrayLike, index_map: ArrayLike) -> npt.NDArray[np.int64]:
    """The slots of the same tokens in another pool, -1 where that pool holds them no longer.

    ``index_map[s]`` is the slot that goes with slot ``s``; 0 or less stands for none (SGLang:
    ``full_to_swa_index_mapping``). Negative ``token_slots`` stay -1. Raises ``BlockIdError`` for a slot
    the map does not have.
    """
    slots, found = _as_indices(token_slots, "token_slots"), _as_indices(index_map, "index_map")
    if slots.size and slots.max() >= found.size:
        raise BlockIdError(
            f"token slot {slots.max()} has no entry in an index map of {found.size}; "
            "pass the map of the pool that the slots belong to"
        )
    mapped = np.where(slots >= 0, found[np.maximum(slots, 0)] if found.size else -1, -1)
    return np.where(mapped > 0, mapped, -1)


def state_ids(num_blocks: int, slot: int, *, num_reserved: int = 0) -> npt.NDArray[np.int32]:
    """Block ids of a request whose recurrent state is slot ``slot`` of a pool indexed by request.

    There is one state, that after ``num_blocks`` blocks of tokens, so only the last boundary is kept:
    ``int32[num_blocks]``, -1 but for the last. Slots below ``num_reserved`` are dummies. Raises
    ``BlockIdError`` for one of them or a negative one.
    """
    if slot < 0:
        raise BlockIdError(f"the state slot must be 0, 1, ..., got {slot}; the request holds no state")
    ids = np.full(num_blocks, -1, np.int32)
    ids[-1:] = slot
    _require_not_reserved(ids, num_reserved)
    return ids


def split_drafts(
    slots: Sequence[BlockId], spec: MambaSpec
) -> tuple[tuple[BlockId, ...], tuple[BlockId, ...]]:
    """The state slots of a running request, as ``(snapshots, drafts)``.

    The last ``spec.num_speculative_blocks`` slots are written by drafted tokens, which may yet be rejected:
    offload the snapshots alone. Raises ``BlockIdError`` where there is no slot left for a snapshot.
    """
    num_snapshots = len(slots) - spec.num_speculative_blocks
    if num_snapshots < 1:
        raise BlockIdError(
            f"a request with {spec.num_speculative_blocks} speculative blocks needs at least one slot more, "
            f"got {len(slots)}; pass all slots of the request, the speculative ones last"
        )
    return tuple(slots[:num_snapshots]), tuple(slots[num_snapshots:])


def block_table(block_ids: ArrayLike) -> list[BlockId | None]:
    """``block_ids`` as a connector wants a request's table: ``None`` where there is no block."""
    return [BlockId(block) if block >= 0 else None for block in _as_indices(block_ids, "block_ids").tolist()]


def _as_indices(values: ArrayLike, name: str) -> npt.NDArray[np.int64]:
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise BlockIdError(
            f"{name} must be a vector of integers, got {found.dtype.name}{list(found.shape)}; "
            "pass the indices of one request"
        )
    return found.astype(np.int64)


def _require_not_reserved(ids: npt.NDArray[np.int32], num_reserved: int) -> None:
    reserved = ids[(ids >= 0) & (ids < num_reserved)]
    if reserved.size:
        raise BlockIdError(
            f"{reserved[0]} is one of {num_reserved} reserved dummies, which hold nothing of a request; "
            "a 0 in a table mostly means that nothing was assigned: cut the table to the request's tokens, "
            "or pass -1"
        )
