"""Finds the cache arrays in a model's pytree and puts new ones back. Knows nothing of layouts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, final

import jax
import numpy as np

from jaxkv.errors import CacheMismatchError, ConfigError, DeletedCacheError
from jaxkv.layout import CacheLeaf, whole_cache_leaf
from jaxkv.sharding import find_shards
from jaxkv.spec import KVCacheConfig, dtype_bits

InspectLeaves = Callable[[Sequence[Any], Sequence[str]], Sequence[tuple[Hashable, CacheLeaf]]]
"""Checks leaves (given with their labels), names the buffer of each and describes it; equal names are one."""


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
    _first_at: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _spread: tuple[tuple[int, CacheLeaf], ...] = field(init=False, repr=False, compare=False)
    """Positions of leaves that several devices hold."""
    _seen_avals: list[Any] = field(init=False, repr=False, compare=False, default_factory=list)
    """Shapes and dtypes at all positions, as they were last found right. Programs return the same objects."""

    def __post_init__(self) -> None:
        first_at = tuple(map(self.unique_at.index, range(len(self.unique))))
        object.__setattr__(self, "_first_at", first_at)
        at = enumerate(self.unique[index] for index in self.unique_at)
        object.__setattr__(self, "_spread", tuple((p, leaf) for p, leaf in at if leaf.sharding is not None))

    def leaves_of(self, layer_name: str) -> list[CacheLeaf]:
        """The leaves of a layer under its name, also those that another layer uses too."""
        return [
            replace(self.unique[index], label=_label(layer_name, place))
            for place, index in enumerate(self.of_layer[layer_name])
        ]

    def read(self, kv_caches: Mapping[str, Any]) -> list[jax.Array]:
        """The unique leaves of ``kv_caches``; raises if they are not shaped as registered or were deleted."""
        flat = self._flatten(kv_caches)
        self._require_kinds(flat)
        leaves = [flat[position] for position in self._first_at]
        if len(flat) > len(leaves):
            self._require_one_buffer_each(flat)
        self._require_alive_and_distinct(leaves)
        return leaves

    def write(self, kv_caches: Mapping[str, Any], replacements: Mapping[int, jax.Array]) -> dict[str, Any]:
        """``kv_caches`` with unique leaf ``i`` replaced by ``replacements[i]`` wherever it stands."""
        seen = self._seen_avals
        for index, leaf in replacements.items():
            if not seen or getattr(leaf, "aval", None) is not seen[self._first_at[index]]:
                _require_kind(leaf, self.unique[index])
        flat = [
            replacements.get(index, leaf)
            for leaf, index in zip(self._flatten(kv_caches), self.unique_at, strict=True)
        ]
        written: dict[str, Any] = jax.tree_util.tree_unflatten(self.treedef, flat)
        return written

    def _require_kinds(self, flat: Sequence[Any]) -> None:
        """Every step asks this of every leaf, and as a rule the answer was given in the step before."""
        avals = [getattr(leaf, "aval", None) for leaf in flat]
        if avals != self._seen_avals:
            for leaf, index in zip(flat, self.unique_at, strict=True):
                _require_kind(leaf, self.unique[index])
            self._seen_avals[:] = avals
        for position, known in self._spread:
            assert known.sharding is not None
            _require_sharding(flat[position], known, known.sharding)

    def _require_one_buffer_each(self, flat: Sequence[jax.Array]) -> None:
        for leaf, index in zip(flat, self.unique_at, strict=True):
            first = flat[self._first_at[index]]
            if first is not leaf and not _same_buffer(first, leaf):
                raise CacheMismatchError(
                    f"{self.unique[index]} was registered in several places as one buffer, "
                    "and now there are two; put the same array in all of them"
                )

    def _require_alive_and_distinct(self, leaves: Sequence[jax.Array]) -> None:
        if any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, leaves))):
            return
        for leaf, known in zip(leaves, self.unique, strict=True):
            # Of a leaf on several devices some parts may be deleted while the leaf itself is not.
            if leaf.is_deleted() or (
                known.sharding is not None and any(buffer.is_deleted() for buffer in _buffers(leaf))
            ):
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


def find_leaves(kv_caches: Mapping[str, Any], config: KVCacheConfig, inspect: InspectLeaves) -> LeafPositions:
    """Flatten ``kv_caches`` and number its distinct leaves.

    Raises ``CacheMismatchError`` for missing or extra layers, layers without leaves, and one buffer that
    stands in the pytree with two shapes or dtypes; and whatever ``inspect`` raises.
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
        labels.append(_label(path[0].key, len(positions)))
        positions.append(position)
    inspected = inspect([leaf for _, leaf in with_path], labels)

    number: dict[Hashable, int] = {}
    unique: list[CacheLeaf] = []
    for name in layer_names:
        if not flat_of_layer[name]:
            raise CacheMismatchError(f"layer {name!r} has no leaf; give it at least one array")
        for position in flat_of_layer[name]:
            identity, described = inspected[position]
            index = number.setdefault(identity, len(unique))
            if index == len(unique):
                unique.append(described)
            _require_one_view(described, unique[index])
    unique_at = tuple(number[identity] for identity, _ in inspected)
    of_layer = {name: tuple(unique_at[p] for p in flat_of_layer[name]) for name in layer_names}
    return LeafPositions(treedef, tuple(unique), unique_at, of_layer)


def _label(layer_name: str, place: int) -> str:
    return f"layer {layer_name!r}, leaf {place}"


def inspect_shapes(leaves: Sequence[Any], labels: Sequence[str]) -> Sequence[tuple[Hashable, CacheLeaf]]:
    """Name each leaf by the object it is. Raises ``CacheMismatchError`` for what has no shape and dtype."""
    return [(id(leaf), _describe(leaf, label)) for leaf, label in zip(leaves, labels, strict=True)]


def inspect_arrays(processes: Collection[int] | None) -> InspectLeaves:
    """Inspects arrays, as far as devices of ``processes`` hold them: ``None`` is this process.

    Names each array by the addresses of its buffers. Raises ``CacheMismatchError`` for what is not an
    array whose bytes lie row-major, or overlaps another without being it; ``DeletedCacheError`` for deleted
    arrays.
    """

    def inspect(leaves: Sequence[Any], labels: Sequence[str]) -> Sequence[tuple[Hashable, CacheLeaf]]:
        inspected = []
        spans: dict[int, tuple[int, str]] = {}
        for leaf, label in zip(leaves, labels, strict=True):
            _require_storable(leaf, label)
            buffers = _buffers(leaf)
            pointers = tuple(buffer.unsafe_buffer_pointer() for buffer in buffers)
            for start, buffer in zip(pointers, buffers, strict=True):
                spans[start] = (start + buffer.size * dtype_bits(leaf.dtype) // 8, label)
            sharding = leaf.sharding if len(leaf.sharding.device_set) > 1 else None
            shards = find_shards(leaf.sharding, leaf.shape, label, processes)
            described = CacheLeaf(label, leaf.shape, leaf.dtype, shards, sharding)
            inspected.append((pointers, described))
        _require_no_overlap(spans)
        return inspected

    return inspect


def _require_no_overlap(spans: Mapping[int, tuple[int, str]]) -> None:
    """``spans`` maps the first byte of a buffer to its end and its label."""
    for (_, (stop, label)), (next_start, (_, next_label)) in pairwise(sorted(spans.items())):
        if stop > next_start:
            raise CacheMismatchError(
                f"the buffers of {label} and {next_label} overlap in part; "
                "pass the array that holds both, and cut it with LayoutHint"
            )


def _buffers(leaf: jax.Array) -> list[jax.Array]:
    """The parts of a leaf that lie on devices of this process."""
    if len(leaf.sharding.device_set) == 1:
        return [leaf]
    return [shard.data for shard in leaf.addressable_shards]


def _require_storable(leaf: Any, label: str) -> None:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        raise CacheMismatchError(
            f"{label} is a {type(leaf).__name__}; every leaf must be a concrete jax.Array"
        )
    _require_dtype(leaf, label)
    if leaf.is_deleted():
        raise _deleted(label)
    layout: Any = getattr(leaf, "format").layout  # noqa: B009 - jax does not declare it
    order = layout.major_to_minor
    if tuple(order) != tuple(range(leaf.ndim)):
        raise CacheMismatchError(
            f"{_describe(leaf, label)} is stored in axis order {order}, expected row-major; "
            "create it without a custom Layout"
        )


def _require_dtype(leaf: Any, label: str) -> None:
    try:
        dtype_bits(leaf.dtype)
    except ConfigError as error:
        raise CacheMismatchError(f"{label}: {error}") from error


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


def _require_kind(leaf: Any, known: CacheLeaf) -> None:
    if not isinstance(leaf, jax.Array):
        raise CacheMismatchError(f"{known.label} is a {type(leaf).__name__}; every leaf must be a jax.Array")
    if leaf.shape != known.shape or leaf.dtype != known.dtype:
        raise CacheMismatchError(
            f"{_describe(leaf, known.label)} was registered as {known}; register the new caches first"
        )


def _require_one_view(leaf: CacheLeaf, known: CacheLeaf) -> None:
    if (leaf.shape, leaf.dtype) != (known.shape, known.dtype):
        raise CacheMismatchError(f"{leaf} and {known} are one buffer; give both the same array")


def _require_sharding(leaf: jax.Array, known: CacheLeaf, sharding: jax.sharding.Sharding) -> None:
    if isinstance(leaf, jax.core.Tracer) or leaf.sharding == sharding:
        return
    if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        raise CacheMismatchError(
            f"{known} was registered with {sharding} and is now on {leaf.sharding}; "
            "keep its sharding, with out_shardings of the function that returned it, or register anew"
        )


def _same_buffer(leaf: jax.Array, other: jax.Array) -> bool:
    if leaf is other:
        return True
    if isinstance(leaf, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    return [buffer.unsafe_buffer_pointer() for buffer in _buffers(leaf)] == [
        buffer.unsafe_buffer_pointer() for buffer in _buffers(other)
    ]


def _describe(leaf: Any, label: str) -> CacheLeaf:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CacheMismatchError(f"{label} is a {type(leaf).__name__}, which has no shape and dtype")
    _require_dtype(leaf, label)
    return whole_cache_leaf(label, tuple(leaf.shape), np.dtype(leaf.dtype))


def _deleted(label: str) -> DeletedCacheError:
    return DeletedCacheError(
        f"{label} was deleted, most likely donated to a jitted function; pass what that function returned"
    )
