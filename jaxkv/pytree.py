"""Finds the cache arrays in a model's pytree and puts new ones back. Knows nothing of layouts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

import jax
import numpy as np

from jaxkv.errors import CacheMismatchError, DeletedCacheError
from jaxkv.layout import CacheLeaf
from jaxkv.spec import KVCacheConfig, dtype_bits

IdentifyLeaves = Callable[[Sequence[Any], Sequence[str]], Sequence[Hashable]]
"""Checks leaves (given with their labels) and names the buffer of each; equal names are one buffer."""


@final
@dataclass(frozen=True, slots=True)
class LeafPositions:
    """Where the leaves of a cache pytree stand, and which positions hold the same array.

    ``unique`` are the distinct leaves in the order in which the groups of the config use them;
    ``unique_at[p]`` is the one at flat position ``p``, ``of_layer[name]`` those of a layer in leaf order.
    """

    treedef: jax.tree_util.PyTreeDef
    unique: tuple[CacheLeaf, ...]
    unique_at: tuple[int, ...]
    of_layer: Mapping[str, tuple[int, ...]] = field(hash=False)

    def read(self, kv_caches: Mapping[str, Any]) -> list[jax.Array]:
        """The unique leaves of ``kv_caches``; raises if they are not shaped as registered or were deleted."""
        found: dict[int, jax.Array] = {}
        for leaf, index in zip(self._flatten(kv_caches), self.unique_at, strict=True):
            known = self.unique[index]
            # Every step runs this for every leaf, so the check is made here and explained elsewhere.
            if not isinstance(leaf, jax.Array) or leaf.shape != known.shape or leaf.dtype != known.dtype:
                raise _other_kind(leaf, known)
            first = found.setdefault(index, leaf)
            if first is not leaf and not _same_buffer(first, leaf):
                raise CacheMismatchError(
                    f"{self.unique[index]} was registered in several places as one buffer, "
                    "and now there are two; put the same array in all of them"
                )
        leaves = [found[index] for index in range(len(self.unique))]
        self._require_alive_and_distinct(leaves)
        return leaves

    def write(self, kv_caches: Mapping[str, Any], replacements: Mapping[int, jax.Array]) -> dict[str, Any]:
        """``kv_caches`` with unique leaf ``i`` replaced by ``replacements[i]`` wherever it stands."""
        for index, leaf in replacements.items():
            known = self.unique[index]
            if not isinstance(leaf, jax.Array) or leaf.shape != known.shape or leaf.dtype != known.dtype:
                raise _other_kind(leaf, known)
        flat = [
            replacements.get(index, leaf)
            for leaf, index in zip(self._flatten(kv_caches), self.unique_at, strict=True)
        ]
        written: dict[str, Any] = jax.tree_util.tree_unflatten(self.treedef, flat)
        return written

    def _require_alive_and_distinct(self, leaves: Sequence[jax.Array]) -> None:
        if any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, leaves))):
            return
        for leaf, known in zip(leaves, self.unique, strict=True):
            if leaf.is_deleted():
                raise _deleted(known.label)
        if len(set(map(id, leaves))) != len(leaves):
            raise CacheMismatchError(
                "one array stands for two cache leaves that were separate when the caches were registered; "
                "give each leaf an array of its own"
            )

    def _flatten(self, kv_caches: Mapping[str, Any]) -> list[Any]:
        flat, treedef = jax.tree_util.tree_flatten(kv_caches)
        if treedef != self.treedef:
            _require_layers(kv_caches, set(self.of_layer))
            raise CacheMismatchError(
                f"the cache pytree is {treedef}, but {self.treedef} was registered; "
                "keep containers and leaf counts as they were"
            )
        return flat


def find_leaves(
    kv_caches: Mapping[str, Any], config: KVCacheConfig, identify: IdentifyLeaves
) -> LeafPositions:
    """Flatten ``kv_caches`` and number its distinct leaves.

    Raises ``CacheMismatchError`` for missing or extra layers, layers without leaves, and one buffer that
    stands in the pytree with two shapes or dtypes; and whatever ``identify`` raises.
    """
    layer_names = [name for group in config.groups for name in group.layer_names]
    _require_layers(kv_caches, set(layer_names))
    with_path, treedef = jax.tree_util.tree_flatten_with_path(kv_caches)
    flat_of_layer: dict[str, list[int]] = {name: [] for name in layer_names}
    labels = []
    for position, (path, _) in enumerate(with_path):
        if not path or not isinstance(path[0], jax.tree_util.DictKey):
            raise CacheMismatchError(
                f"kv_caches is a {type(kv_caches).__name__}, which JAX does not take apart; pass a dict"
            )
        positions = flat_of_layer[path[0].key]
        labels.append(f"layer {path[0].key!r}, leaf {len(positions)}")
        positions.append(position)
    identities = identify([leaf for _, leaf in with_path], labels)
    described = [_describe(leaf, label) for (_, leaf), label in zip(with_path, labels, strict=True)]

    number: dict[Hashable, int] = {}
    unique: list[CacheLeaf] = []
    for name in layer_names:
        if not flat_of_layer[name]:
            raise CacheMismatchError(f"layer {name!r} has no leaf; give it at least one array")
        for position in flat_of_layer[name]:
            index = number.setdefault(identities[position], len(unique))
            if index == len(unique):
                unique.append(described[position])
            _require_one_view(described[position], unique[index])
    unique_at = tuple(number[identity] for identity in identities)
    of_layer = {name: tuple(unique_at[p] for p in flat_of_layer[name]) for name in layer_names}
    return LeafPositions(treedef, tuple(unique), unique_at, of_layer)


def identify_arrays(leaves: Sequence[Any], labels: Sequence[str]) -> Sequence[Hashable]:
    """Name each array by the address of its buffer.

    Raises ``CacheMismatchError`` for what is not an array whose bytes lie row-major on one device, or
    overlaps another without being it; ``DeletedCacheError`` for deleted arrays.
    """
    for leaf, label in zip(leaves, labels, strict=True):
        _require_storable(leaf, label)
    spans = {}
    for leaf, label in zip(leaves, labels, strict=True):
        start = leaf.unsafe_buffer_pointer()
        spans[start] = (start + leaf.size * dtype_bits(leaf.dtype) // 8, label)
    for (_, (stop, label)), (next_start, (_, next_label)) in pairwise(sorted(spans.items())):
        if stop > next_start:
            raise CacheMismatchError(
                f"the buffers of {label} and {next_label} overlap in part; "
                "pass the array that holds both, and cut it with LayoutHint"
            )
    return [leaf.unsafe_buffer_pointer() for leaf in leaves]


def _require_storable(leaf: Any, label: str) -> None:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        raise CacheMismatchError(
            f"{label} is a {type(leaf).__name__}; every leaf must be a concrete jax.Array"
        )
    if leaf.is_deleted():
        raise _deleted(label)
    if len(leaf.sharding.device_set) > 1:
        raise CacheMismatchError(
            f"{_describe(leaf, label)} lies on {len(leaf.sharding.device_set)} devices, "
            "which is not supported yet; keep each leaf on one device"
        )
    _require_row_major(leaf, label)


def _require_row_major(leaf: Any, label: str) -> None:
    order = leaf.format.layout.major_to_minor
    if tuple(order) != tuple(range(leaf.ndim)):
        raise CacheMismatchError(
            f"{_describe(leaf, label)} is stored in axis order {order}, expected row-major; "
            "create it without a custom Layout"
        )
    bits = dtype_bits(leaf.dtype)
    if bits < 8 and leaf.on_device_size_in_bytes() * 8 != leaf.size * bits:
        raise CacheMismatchError(
            f"{_describe(leaf, label)} is not stored packed by this jaxlib; keep such values in a uint8 array"
        )


def _require_layers(kv_caches: Mapping[str, Any], expected: set[str]) -> None:
    if not isinstance(kv_caches, Mapping):
        raise CacheMismatchError(
            f"kv_caches is a {type(kv_caches).__name__}; pass a dict {{layer_name: leaf or leaves}}"
        )
    if kv_caches.keys() == expected:
        return
    missing = sorted(expected - kv_caches.keys())
    extra = sorted(map(str, kv_caches.keys() - expected))
    raise CacheMismatchError(
        f"the cache pytree and its KVCacheConfig name different layers: missing {missing}, extra {extra}; "
        "give every layer of the config its cache, and leave others out"
    )


def _other_kind(leaf: Any, known: CacheLeaf) -> CacheMismatchError:
    if not isinstance(leaf, jax.Array):
        return CacheMismatchError(f"{known.label} is a {type(leaf).__name__}; every leaf must be a jax.Array")
    return CacheMismatchError(
        f"{_describe(leaf, known.label)} was registered as {known}; register the new caches first"
    )


def _require_one_view(leaf: CacheLeaf, known: CacheLeaf) -> None:
    if (leaf.shape, leaf.dtype) != (known.shape, known.dtype):
        raise CacheMismatchError(f"{leaf} and {known} are one buffer; give both the same array")


def _same_buffer(leaf: jax.Array, other: jax.Array) -> bool:
    if leaf is other:
        return True
    if isinstance(leaf, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    return leaf.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


def _describe(leaf: Any, label: str) -> CacheLeaf:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CacheMismatchError(f"{label} is a {type(leaf).__name__}, which has no shape and dtype")
    return CacheLeaf(label, tuple(leaf.shape), np.dtype(leaf.dtype))


def _deleted(label: str) -> DeletedCacheError:
    return DeletedCacheError(
        f"{label} was deleted, most likely donated to a jitted function; pass what that function returned"
    )
