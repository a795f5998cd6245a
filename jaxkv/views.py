"""Typed arrays inside rows of bytes, for models that overlay layers on one uint8 leaf. Decides no layout.

Reading gathers bytes and then bitcasts them; writing bitcasts values and then scatters their bytes. So the
leaf stays uint8, only the bytes asked for are touched, and a donated leaf is written in place. All of it is
pure and works inside a caller's ``jit``, ``scan`` and the like. Bits are never converted: NaN payloads,
subnormals and negative zeros survive. Gradients do not pass through.

Data alone orders reads and writes: where XLA may put a write before a read of the leaf as it was, it copies
the whole leaf first. So read from the leaf that the last write returned, or write what was computed from
all that was read, as ``write_together`` does for the states of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxkv.errors import BlockIdError, CacheMismatchError, ConfigError
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    dtype_bits,
    page_size_bytes,
)


@final
@dataclass(frozen=True, slots=True)
class PageView:
    """An array of ``shape`` and ``dtype`` that starts ``offset_bytes`` into each row of a leaf.

    A leaf is ``uint8[num_blocks, page_bytes]``; its row ``b`` is block ``b``. Any offset will do, aligned or
    not. A bool takes a byte; types below a byte are packed, the first element in the low bits, as JAX stores
    them. Block ids are int32 of any shape, written ``ids`` in the shapes below; an id that is -1 or no block
    of the leaf reads as zero bytes and is not written. Which of several writes to one place stays is not
    defined.

    Raises ``ConfigError`` for what cannot be stored or is not whole bytes. The methods raise
    ``CacheMismatchError`` for a leaf the view does not fit or values that are not the view's, and
    ``BlockIdError`` for ids that are not int32.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    offset_bytes: int = 0

    def __post_init__(self) -> None:
        _require_storable(self.dtype)
        if not isinstance(self.offset_bytes, int) or self.offset_bytes < 0:
            raise ConfigError(f"PageView.offset_bytes must be 0, 1, ..., got {self.offset_bytes!r}")
        if any(not isinstance(size, int | np.integer) or size < 1 for size in self.shape):
            raise ConfigError(f"every axis of a PageView must be at least 1 long, got shape {self.shape}")
        _num_bytes(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{_describe(self.shape, self.dtype)} at byte {self.offset_bytes}"

    @property
    def num_bytes(self) -> int:
        """Bytes of one row that the view covers."""
        return _num_bytes(self.shape, self.dtype)

    def read(self, leaf: jax.Array, block_ids: ArrayLike) -> jax.Array:
        """What the blocks hold: ``dtype[*ids, *shape]``."""
        _require_fit(self, leaf)
        ids = _as_int32(block_ids, "block_ids")
        return _from_bytes(_gather(leaf, ids, self.offset_bytes, self.num_bytes), self.shape, self.dtype)

    def write(self, leaf: jax.Array, block_ids: ArrayLike, values: jax.Array) -> jax.Array:
        """The leaf with ``values``, ``dtype[*ids, *shape]``, in the blocks; donate it to write in place."""
        return write_together((self,), leaf, block_ids, (values,))

    def read_tokens(self, leaf: jax.Array, block_table: ArrayLike) -> jax.Array:
        """All tokens of each sequence: ``dtype[..., max_blocks * shape[0], *shape[1:]]``.

        ``block_table`` is int32 ``[..., max_blocks]``; axis 0 of the view counts the tokens of a block.
        """
        self._require_tokens()
        table = jnp.atleast_1d(_as_int32(block_table, "block_table"))
        *sequences, max_blocks = table.shape
        return self.read(leaf, table).reshape(*sequences, max_blocks * self.shape[0], *self.shape[1:])

    def write_tokens(
        self, leaf: jax.Array, block_ids: ArrayLike, slots_in_block: ArrayLike, values: jax.Array
    ) -> jax.Array:
        """The leaf with one token's ``values`` at each ``(block, slot)``; only their bytes are touched.

        ``slots_in_block`` is int32 of the shape of ``block_ids``, ``values`` is ``dtype[*ids, *shape[1:]]``.
        A slot outside the block is not written. Raises ``ConfigError`` if a token is not whole bytes.
        """
        _require_fit(self, leaf)
        self._require_tokens()
        ids = _as_int32(block_ids, "block_ids")
        slots = _as_int32(slots_in_block, "slots_in_block")
        if slots.shape != ids.shape:
            raise BlockIdError(
                f"slots_in_block has shape {slots.shape}, block_ids {ids.shape}; give one slot for each id"
            )
        _require_values(values, (*ids.shape, *self.shape[1:]), self.dtype)
        token_bytes = _num_bytes(self.shape[1:], self.dtype)
        ids = jnp.where((slots >= 0) & (slots < self.shape[0]), ids, -1)
        return _scatter(leaf, ids, self.offset_bytes + slots * token_bytes, _to_bytes(values, ids.ndim))

    def _require_tokens(self) -> None:
        if not self.shape:
            raise ConfigError(f"{self} has no axis that counts tokens; read and write it as a whole")


def write_together(
    views: Sequence[PageView], leaf: jax.Array, block_ids: ArrayLike, values: Sequence[jax.Array]
) -> jax.Array:
    """The leaf with one array for each view in the blocks, written at once when all are known.

    ``views`` lie one after another, as those of ``layer_views`` do. Raises ``ConfigError`` if they do not,
    and what ``PageView.write`` raises.
    """
    if not views or len(views) != len(values):
        raise ConfigError(f"{len(views)} views cannot hold {len(values)} arrays; give one for each")
    for before, after in pairwise(views):
        if after.offset_bytes != before.offset_bytes + before.num_bytes:
            raise ConfigError(f"{after} does not begin where {before} ends; write them one by one")
    ids = _as_int32(block_ids, "block_ids")
    for view, array in zip(views, values, strict=True):
        _require_fit(view, leaf)
        _require_values(array, (*ids.shape, *view.shape), view.dtype)
    raw = jnp.concatenate([_to_bytes(array, ids.ndim) for array in values], axis=-1)
    return _scatter(leaf, ids, jnp.full_like(ids, views[0].offset_bytes), raw)


def layer_views(spec: LayerSpec, offset_bytes: int = 0) -> tuple[PageView, ...]:
    """The views of one layer, one after another from ``offset_bytes``: the order of its canonical page.

    ``(k, v)`` of shape ``[block_size, num_kv_heads, head_size]`` for attention, ``(latent,)`` of shape
    ``[block_size, head_size]`` for MLA, one view for each state for a ``MambaSpec``. ``offset_bytes`` is
    the ``page_offset_bytes`` of the layer's ``LayoutHint``. Raises ``ConfigError`` if one is not whole bytes
    or they do not fit the ``page_size_bytes`` of the spec.
    """
    views: list[PageView] = []
    end = offset_bytes
    for shape, dtype in _arrays_of(spec):
        views.append(PageView(shape, dtype, end))
        end += views[-1].num_bytes
    if end - offset_bytes > page_size_bytes(spec):
        raise ConfigError(
            f"{type(spec).__name__} stores {page_size_bytes(spec)} bytes a block, but its arrays take "
            f"{end - offset_bytes}; correct page_size_bytes, or make a PageView for each array by hand"
        )
    return tuple(views)


def _arrays_of(spec: LayerSpec) -> list[tuple[tuple[int, ...], DTypeLike]]:
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            head_size_v = spec.head_size if spec.head_size_v is None else spec.head_size_v
            heads = (spec.block_size, spec.num_kv_heads)
            return [((*heads, size), spec.dtype) for size in (spec.head_size, head_size_v)]
        case MLAAttentionSpec():
            return [((spec.block_size, spec.head_size), spec.dtype)]
        case MambaSpec():
            return list(zip(spec.shapes, spec.dtypes, strict=True))
        case _:
            assert_never(spec)


def _describe(shape: tuple[int, ...], dtype: DTypeLike) -> str:
    return f"{np.dtype(dtype).name}{list(shape)}"


def _require_storable(dtype: DTypeLike) -> None:
    bits = dtype_bits(dtype)
    known = np.dtype(dtype)
    plain = any(jnp.issubdtype(known, kind) for kind in (jnp.integer, jnp.floating, jnp.bool_))
    if not plain or not known.isnative or bits not in (2, 4, 8, 16, 32, 64):
        raise ConfigError(
            f"a PageView cannot hold {known}; use an integer, floating or bool dtype that jax stores, "
            "or two views for the parts of a complex array"
        )


def _num_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    bits = int(math.prod(shape)) * dtype_bits(dtype)
    if bits % 8:
        raise ConfigError(f"{_describe(shape, dtype)} is {bits} bits, not whole bytes; pad its last axis")
    return bits // 8


def _as_int32(values: ArrayLike, name: str) -> jax.Array:
    found = jnp.asarray(values)
    if found.dtype != jnp.int32:
        raise BlockIdError(f"{name} must be int32, got {found.dtype}; convert with .astype(jnp.int32)")
    return found


def _require_fit(view: PageView, leaf: jax.Array) -> None:
    if leaf.ndim != 2 or leaf.dtype != np.uint8:
        raise CacheMismatchError(
            f"a view needs a leaf uint8[num_blocks, page_bytes], got {_describe(leaf.shape, leaf.dtype)}; "
            "allocate rows of bytes, or use the typed leaf without a view"
        )
    end = view.offset_bytes + view.num_bytes
    if end > leaf.shape[1]:
        raise CacheMismatchError(
            f"{view} ends at byte {end}, but a row of {_describe(leaf.shape, leaf.dtype)} has "
            f"{leaf.shape[1]}; make rows as wide as the largest page of all groups, or correct the view"
        )
    if jax.dtypes.canonicalize_dtype(view.dtype) != np.dtype(view.dtype):
        raise CacheMismatchError(f"{view} needs 64-bit types; set jax_enable_x64")


def _require_values(values: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    if values.shape != shape or values.dtype != np.dtype(dtype):
        raise CacheMismatchError(
            f"values must be {_describe(shape, dtype)}, got {_describe(values.shape, values.dtype)}; "
            "reshape or convert them, a view never does"
        )


def _gather(leaf: jax.Array, ids: jax.Array, start: int, num_bytes: int) -> jax.Array:
    """Bytes ``start`` to ``start + num_bytes`` of the rows ``ids``: ``uint8[*ids, num_bytes]``."""
    dims = lax.GatherDimensionNumbers(
        offset_dims=(ids.ndim,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    starts = jnp.stack([ids, jnp.full_like(ids, start)], axis=-1)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(leaf, starts, dims, slice_sizes=(1, num_bytes), mode=mode, fill_value=0)


def _scatter(leaf: jax.Array, ids: jax.Array, starts: jax.Array, raw: jax.Array) -> jax.Array:
    """The leaf with ``raw``, ``uint8[*ids, num_bytes]``, at bytes ``starts`` of the rows ``ids``."""
    # One window for each id: with an index for each byte, as ``leaf.at[ids, bytes]`` has, XLA on the CPU
    # takes twenty to forty times as long.
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=(ids.ndim,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    places = jnp.stack([ids, starts], axis=-1)
    return lax.scatter(leaf, places, raw, dims, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _from_bytes(raw: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """``uint8[*ids, num_bytes]`` as ``dtype[*ids, *shape]``."""
    *ids, num_bytes = raw.shape
    bits = dtype_bits(dtype)
    if np.dtype(dtype) == np.bool_:
        return (raw != 0).reshape(*ids, *shape)  # XLA has no bitcast for bool
    elements = raw.reshape(*ids, num_bytes * 8 // bits, bits // 8) if bits > 8 else raw
    return lax.bitcast_convert_type(elements, dtype).reshape(*ids, *shape)


def _to_bytes(values: jax.Array, ids_ndim: int) -> jax.Array:
    """``dtype[*ids, *shape]`` as ``uint8[*ids, num_bytes]``."""
    ids, shape = values.shape[:ids_ndim], values.shape[ids_ndim:]
    bits, num_bytes = dtype_bits(values.dtype), _num_bytes(shape, values.dtype)
    if values.dtype == np.bool_:
        return lax.convert_element_type(values, jnp.uint8).reshape(*ids, num_bytes)
    elements = values.reshape(*ids, num_bytes, 8 // bits) if bits < 8 else values
    return lax.bitcast_convert_type(elements, jnp.uint8).reshape(*ids, num_bytes)
