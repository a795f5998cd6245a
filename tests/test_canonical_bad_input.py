"""What ``canonicalize`` refuses, and that each message names the layer, the shape and the remedy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from jaxkv.canonical import canonicalize, canonicalize_shapes
from jaxkv.errors import CacheMismatchError, ConfigError, DeletedCacheError
from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

P, S, H, D = 11, 4, 3, 5
BF16 = jnp.bfloat16
PAGE_BYTES = 2 * S * H * D * 2
FULL = FullAttentionSpec(S, H, D, BF16)
STATE = MambaSpec(8, ((3, 7), (2, 4)), (BF16, jnp.float32))


def config(*layers, spec=FULL, num_blocks=P):
    return KVCacheConfig((KVCacheGroupSpec(layers or ("a",), spec, num_blocks),))


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def array(*sizes, dtype=BF16):
    return jnp.zeros(sizes, dtype)


PACKED = (P, S, 2 * H, D)


def states(*leaves):
    return {"a": leaves}


ATTENTION_REFUSALS = {
    "missing layer": ({"a": shape(*PACKED)}, config("a", "b"), {}, r"missing \['b'\], extra \[\]"),
    "extra layer": (
        {"a": shape(*PACKED), "c": shape(*PACKED)},
        config(),
        {},
        r"missing \[\], extra \['c'\]; give every layer",
    ),
    "not a dict": ([shape(*PACKED)], config(), {}, "kv_caches is a list; pass a dict"),
    "a mapping jax keeps whole": (
        types.MappingProxyType({"a": shape(*PACKED)}),
        config(),
        {},
        "kv_caches is a mappingproxy",
    ),
    "layer without leaves": ({"a": ()}, config(), {}, "layer 'a' has no leaf"),
    "leaf without a shape": ({"a": 1.5}, config(), {}, "layer 'a', leaf 0 is a float"),
    "scalar leaf": ({"a": shape()}, config(), {}, r"bfloat16\[\]\): no axis has the size 11"),
    "block axis missing": (
        {"a": shape(S, 2 * H, D)},
        config(),
        {},
        r"layer 'a', leaf 0 \(bfloat16\[4, 6, 5\]\): no axis has the size 11 .*LayoutHint",
    ),
    "other num_blocks": (
        {"a": shape(P + 1, S, 2 * H, D)},
        config(),
        {},
        "no axis has the size 11 .* check num_blocks of the group",
    ),
    "ambiguous block axis": (
        {"a": shape(4, 4, 6, 5)},
        config(num_blocks=4),
        {},
        r"axes \[0, 1\] all have the size 4",
    ),
    "rank below the hinted axis": (
        {"a": shape(P, PAGE_BYTES // 2)},
        config(),
        {"a": LayoutHint(block_axis=3)},
        "has rank 2, but its LayoutHint names block axis 3",
    ),
    "hinted axis of another size": (
        {"a": shape(*PACKED)},
        config(),
        {"a": LayoutHint(block_axis=1)},
        "block axis 1 has size 4, expected 11",
    ),
    "kernel blocks that do not fit": (
        {"a": shape(*PACKED)},
        config(),
        {"a": LayoutHint(block_axis=0, kernel_blocks_per_block=2)},
        r"block axis 0 has size 11, expected 22 \(num_blocks times kernel_blocks_per_block=2\)",
    ),
    "wrong rank": (
        {"a": shape(P, S, D)},
        config(),
        {},
        r"\(bfloat16\[11, 4, 5\]\): 40 bytes a block, but FullAttentionSpec says 240",
    ),
    "one of K and V": ({"a": shape(P, S, H, D)}, config(), {}, "120 bytes a block, .* says 240"),
    "one leaf too many": (
        {"a": [shape(P, S, H, D)] * 1 + [shape(P, S, H, D), shape(P, S, H, D)]},
        config(),
        {},
        "360 bytes a block",
    ),
    "wrong dtype": (
        {"a": shape(*PACKED, dtype=jnp.float16)},
        config(),
        {},
        r"layer 'a', leaf 0 \(float16\[11, 4, 6, 5\]\) must be bfloat16 as its spec says, or uint8",
    ),
    "row wider than the page": (
        {"a": shape(P, 256, dtype=jnp.uint8)},
        config(),
        {},
        r"256 bytes a block, .* says 240; .*LayoutHint\(page_offset_bytes",
    ),
    "hint that stores another size": (
        {"a": shape(P, 256, dtype=jnp.uint8)},
        config(),
        {"a": LayoutHint(page_size_bytes=250)},
        "250 bytes a block, .* says 240",
    ),
    "page past the end of its row": (
        {"a": shape(P, 256, dtype=jnp.uint8)},
        config(),
        {"a": LayoutHint(page_offset_bytes=17)},
        "bytes 17 to 257 were asked for, but a block has 256",
    ),
    "offset into several leaves without a size": (
        {"a": (shape(P, 2, S, H, D), shape(P, 2, S, H, D))},
        config(),
        {"a": LayoutHint(page_offset_bytes=120)},
        r"one of 2 leaves .* LayoutHint\(page_size_bytes=...\)",
    ),
    "two layers over one leaf": (
        dict.fromkeys(("a", "b"), shape(*PACKED)),
        config("a", "b"),
        {},
        r"layers 'a' and 'b' of one group use the same bytes of layer 'a', leaf 0 \(bfloat16",
    ),
    "K and V in one array": ({"a": [shape(P, S, H, D)] * 2}, config(), {}, "use the same bytes"),
    "pages that overlap by one byte": (
        dict.fromkeys(("a", "b"), shape(P, 512, dtype=jnp.uint8)),
        config("a", "b"),
        {"a": LayoutHint(page_size_bytes=240), "b": LayoutHint(page_offset_bytes=239)},
        "use the same bytes",
    ),
    "one leaf split in two ways": (
        dict.fromkeys(("a", "b"), shape(P, P, 2 * PAGE_BYTES, dtype=jnp.uint8)),
        config("a", "b"),
        {
            "a": LayoutHint(block_axis=0, page_size_bytes=240),
            "b": LayoutHint(block_axis=1, page_offset_bytes=240),
        },
        "in different ways",
    ),
}

STATE_REFUSALS = {
    "one leaf for two states": ({"a": shape(6, 3, 7)}, {}, "should be the 2 states of a MambaSpec"),
    "states in another order": (
        states(shape(6, 2, 4, dtype=jnp.float32), shape(6, 3, 7)),
        {},
        r"holds states float32\[2, 4\], but its MambaSpec says bfloat16\[3, 7\]; .* in the order",
    ),
    "state of another dtype": (
        states(shape(6, 3, 7), shape(6, 2, 4)),
        {},
        r"leaf 1 .* holds states bfloat16\[2, 4\], but its MambaSpec says float32\[2, 4\]",
    ),
    "state of raw bytes with the shape of its elements": (
        states(shape(6, 3, 7), shape(6, 2, 4, dtype=jnp.uint8)),
        {},
        r"holds states uint8\[2, 4\]",
    ),
    "state of another rank": (
        states(shape(6, 21), shape(6, 2, 4, dtype=jnp.float32)),
        {},
        r"holds states bfloat16\[21\], but its MambaSpec says bfloat16\[3, 7\]",
    ),
    "other num_blocks": (
        states(shape(5, 3, 7), shape(5, 2, 4, dtype=jnp.float32)),
        {},
        "no axis has the size 6",
    ),
    "hint that cuts a typed state": (
        states(shape(6, 3, 7), shape(6, 2, 4, dtype=jnp.float32)),
        {"a": LayoutHint(page_offset_bytes=8)},
        "use a uint8 row for that",
    ),
    "row narrower than the state": ({"a": shape(6, 73, dtype=jnp.uint8)}, {}, "73 bytes a block, .* says 74"),
    "padding the spec does not know": ({"a": shape(6, 96, dtype=jnp.uint8)}, {}, "96 bytes a block"),
}


@pytest.mark.parametrize(
    ("kv_caches", "cache_config", "hints", "message"), ATTENTION_REFUSALS.values(), ids=ATTENTION_REFUSALS
)
def test_attention_caches_that_do_not_fit_are_refused(kv_caches, cache_config, hints, message):
    with pytest.raises(CacheMismatchError, match=message):
        canonicalize_shapes(kv_caches, cache_config, hints)


@pytest.mark.parametrize(("kv_caches", "hints", "message"), STATE_REFUSALS.values(), ids=STATE_REFUSALS)
def test_state_caches_that_do_not_fit_are_refused(kv_caches, hints, message):
    with pytest.raises(CacheMismatchError, match=message):
        canonicalize_shapes(kv_caches, config(spec=STATE, num_blocks=6), hints)


def test_hints_for_unknown_layers_are_refused():
    with pytest.raises(ConfigError, match=r"no group has: \['z'\]"):
        canonicalize_shapes({"a": shape(*PACKED)}, config(), {"z": LayoutHint()})


def test_a_group_cannot_be_laid_over_another_with_a_row_of_another_width():
    row = shape(9, 240, dtype=jnp.uint8)
    padded = MambaSpec(8, STATE.shapes, STATE.dtypes, page_size_padded=256)
    both = KVCacheConfig((KVCacheGroupSpec(("a",), FULL, 9), KVCacheGroupSpec(("m",), padded, 9)))
    with pytest.raises(CacheMismatchError, match="240 bytes a block, but MambaSpec says 74"):
        canonicalize_shapes({"a": row, "m": row}, both)


@pytest.mark.parametrize("leaf", [np.zeros(PACKED, BF16), shape(*PACKED), 3], ids=["numpy", "struct", "int"])
def test_leaves_that_are_not_jax_arrays_are_refused(leaf):
    with pytest.raises(
        CacheMismatchError, match=r"layer 'a', leaf 0 is a .*every leaf must be a concrete jax\.Array"
    ):
        canonicalize({"a": leaf}, config())


def test_tracers_are_refused_at_registration():
    with pytest.raises(CacheMismatchError, match="concrete"):
        jax.jit(lambda leaf: canonicalize({"a": leaf}, config()).fingerprint)(array(*PACKED))


def test_deleted_arrays_are_refused():
    leaf = array(*PACKED)
    leaf.delete()
    with pytest.raises(DeletedCacheError, match=r"layer 'a', leaf 0 was deleted, .*pass what that function"):
        canonicalize({"a": leaf}, config())


def test_arrays_in_another_axis_order_are_refused():
    leaf = array(*PACKED)
    leaf = jax.device_put(leaf, Format(Layout((1, 0, 2, 3)), leaf.sharding))
    with pytest.raises(CacheMismatchError, match=r"stored in axis order \(1, 0, 2, 3\), expected row-major"):
        canonicalize({"a": leaf}, config())


def test_arrays_that_share_part_of_their_memory_are_refused():
    whole = np.zeros(4096 + 64, np.uint8)
    start = -whole.ctypes.data % 64
    first = jax.dlpack.from_dlpack(whole[start : start + 2048].reshape(8, 256))
    second = jax.dlpack.from_dlpack(whole[start + 1024 : start + 3072].reshape(8, 256))
    raw = FullAttentionSpec(4, 4, 8, jnp.uint8)
    with pytest.raises(CacheMismatchError, match="layer 'a', leaf 0 and layer 'b', leaf 0 overlap in part"):
        canonicalize({"a": first, "b": second}, config("a", "b", spec=raw, num_blocks=8))


def test_one_buffer_seen_as_two_shapes_is_refused():
    whole = np.zeros(4096 + 64, np.uint8)
    start = -whole.ctypes.data % 64
    first = jax.dlpack.from_dlpack(whole[start : start + 2048].reshape(8, 256))
    second = jax.dlpack.from_dlpack(whole[start : start + 2048].reshape(8, 16, 16))
    raw = FullAttentionSpec(4, 4, 8, jnp.uint8)
    with pytest.raises(CacheMismatchError, match="are one buffer; give both the same array"):
        canonicalize({"a": first, "b": second}, config("a", "b", spec=raw, num_blocks=8))


def registered():
    kv_caches = {"a": (array(P, S, H, D), array(P, S, H, D))}
    return canonicalize(kv_caches, config()), kv_caches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: {}, r"missing \['a'\]"),
        (lambda k, v: {"a": (k, v), "b": k}, r"extra \['b'\]"),
        (lambda k, v: {"a": (k,)}, "was registered; keep containers and leaf counts"),
        (lambda k, v: {"a": [k, v]}, "was registered; keep containers and leaf counts"),
        (lambda k, v: {"a": (k, v[:-1])}, r"leaf 1 \(bfloat16\[10, .* was registered as .*\[11, 4, 3, 5\]"),
        (
            lambda k, v: {"a": (k, v.astype(jnp.float32))},
            r"leaf 1 \(float32\[.* was registered as .*bfloat16",
        ),
        (lambda k, v: {"a": (k, np.zeros(v.shape, v.dtype))}, "leaf 1 is a ndarray"),
        (lambda k, v: None, "kv_caches is a NoneType"),
    ],
)
def test_caches_that_changed_since_registration_are_refused(change, message):
    canonical, kv_caches = registered()
    changed = change(*kv_caches["a"])
    with pytest.raises(CacheMismatchError, match=message):
        canonical.leaves(changed)


def test_replacements_must_be_as_many_and_of_the_same_kind():
    canonical, kv_caches = registered()
    k, v = kv_caches["a"]
    with pytest.raises(CacheMismatchError, match="group 0 has 2 leaves, got 1"):
        canonical.replace(kv_caches, 0, [k])
    with pytest.raises(CacheMismatchError, match=r"leaf 1 .* was registered as"):
        canonical.replace(kv_caches, 0, [k, v[:-1]])
