"""Descriptions that do not fit their caches: each refusal names the layer, the shape and the remedy."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxkv.canonical import canonicalize_shapes
from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, MLAAttentionSpec

P, S, H, D = 11, 4, 3, 5
BF16 = jnp.bfloat16
PAGE_BYTES = 2 * S * H * D * 2
FULL = FullAttentionSpec(S, H, D, BF16)
STATE = MambaSpec(8, ((3, 7), (2, 4)), (BF16, jnp.float32))


def config(*layers, spec=FULL, num_blocks=P):
    return KVCacheConfig((KVCacheGroupSpec(layers or ("a",), spec, num_blocks),))


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


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
    "rows of another length": (
        {"a": [shape(2, 21, H, D), shape(2, 21, H, D)]},
        config(num_blocks=10),
        {"a": LayoutHint((0, 1), S)},
        r"block axis \(0, 1\) has size 2 x 21, expected 40 .* in whole blocks to a row",
    ),
    "rows whose tokens are of another number": (
        {"a": shape(2, 20, 2 * H, D)},
        config(num_blocks=10),
        {"a": LayoutHint((0, 1), S + 1)},
        "has size 2 x 20, expected 50",
    ),
    "requests and tokens the wrong way round": (
        {"a": shape(2, 20, 2 * H, D)},
        config(num_blocks=10),
        {"a": LayoutHint((1, 0), S)},
        r"block axis \(1, 0\) has size 20 x 2, expected 40 .* in whole blocks to a row",
    ),
    "a row axis out of reach": (
        {"a": shape(2, 20, 2 * H, D)},
        config(num_blocks=10),
        {"a": LayoutHint((4, 1), S)},
        "has rank 4, but its LayoutHint names block axis 4",
    ),
    "a head axis out of reach": (
        {"a": shape(*PACKED)},
        config(),
        {"a": LayoutHint(head_axis=4)},
        "has rank 4, but its LayoutHint names head axis 4",
    ),
    "head copies on one device": (
        {"a": shape(*PACKED)},
        config(),
        {"a": LayoutHint(head_axis=2, head_copies=2)},
        "each device holds 6 of the 6 heads on axis 2, so head_copies=2 are not one to a device",
    ),
    "scales that the spec does not count": (
        {"a": (shape(P, S, H, D), shape(P, S, H, D), shape(P, S, H, dtype=jnp.float32))},
        config(),
        {},
        r"leaf 2 \(float32.* must be bfloat16 .*page_size_bytes to all a block stores where scales lie",
    ),
    "scales of another size than counted": (
        {"a": (shape(P, S, H, D), shape(P, S, H, D), shape(P, S, H, dtype=jnp.float32))},
        config(spec=FullAttentionSpec(S, H, D, BF16, page_size_bytes=PAGE_BYTES + S * H * 2)),
        {},
        "288 bytes a block, but FullAttentionSpec says 264",
    ),
    "values of no dtype of the spec": (
        {"a": (shape(P, S, H, D, dtype=jnp.float16), shape(P, S, H, D, dtype=jnp.float16))},
        config(spec=FullAttentionSpec(S, H, D, BF16, page_size_bytes=PAGE_BYTES)),
        {},
        r"leaf 0 \(float16.* must be bfloat16",
    ),
    "value heads of another size": (
        {"a": (shape(P, S, H, D), shape(P, S, H, D))},
        config(spec=FullAttentionSpec(S, H, D, BF16, head_size_v=D + 2)),
        {},
        "240 bytes a block, but FullAttentionSpec says 288",
    ),
    "a latent row of another width": (
        {"a": shape(P, S, 20)},
        config(spec=MLAAttentionSpec(S, 19, BF16)),
        {},
        "160 bytes a block, but MLAAttentionSpec says 152",
    ),
    "a part that is no row of one axis": (
        {"a": shape(2, P, S, H, D)},
        config(spec=FullAttentionSpec(S, H, D, BF16, page_size_bytes=180)),
        {"a": LayoutHint(1, page_size_bytes=180)},
        r"layer 'a', leaf 0 .* bytes 0 to 180 of a block cut its runs of 120 bytes",
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


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ([LayoutHint()], "layer 'a' has 2 leaves and 1 hints"),
        ([LayoutHint(0)] * 3, "layer 'a' has 2 leaves and 3 hints"),
        ([LayoutHint(), None], "hints of layer 'a' must be a LayoutHint or a list of them"),
        (0, "hints of layer 'a' must be a LayoutHint or a list of them, not 0"),
        ("auto", "hints of layer 'a' must be a LayoutHint or a list of them, not 'auto'"),
    ],
)
def test_hints_that_are_not_one_for_each_leaf_are_refused(hints, message):
    separate = {"a": (shape(P, S, H, D), shape(P, S, H, D))}
    with pytest.raises(ConfigError, match=message):
        canonicalize_shapes(separate, config(), {"a": hints})


def test_hints_for_unknown_layers_are_refused():
    with pytest.raises(ConfigError, match=r"no group has: \['z'\]"):
        canonicalize_shapes({"a": shape(*PACKED)}, config(), {"z": LayoutHint()})


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (LayoutHint(0), "layer 'm', leaf 0 .* 256 bytes a block, but MambaSpec says 74"),
        (LayoutHint(1), "layer 'm', leaf 0 .* block axis 1 has size 256"),
        (LayoutHint(page_offset_bytes=200), "layer 'm', leaf 0 .* bytes 200 to 274 were asked for"),
    ],
)
def test_of_layers_that_share_an_array_the_one_that_does_not_fit_is_named(hint, message):
    row = shape(9, 256, dtype=jnp.uint8)
    both = KVCacheConfig((KVCacheGroupSpec(("a",), FULL, 9), KVCacheGroupSpec(("m",), STATE, 9)))
    with pytest.raises(CacheMismatchError, match=message):
        canonicalize_shapes({"a": row, "m": row}, both, {"a": LayoutHint(page_size_bytes=240), "m": hint})


def test_a_group_cannot_be_laid_over_another_with_a_row_of_another_width():
    row = shape(9, 240, dtype=jnp.uint8)
    padded = MambaSpec(8, STATE.shapes, STATE.dtypes, page_size_padded=256)
    both = KVCacheConfig((KVCacheGroupSpec(("a",), FULL, 9), KVCacheGroupSpec(("m",), padded, 9)))
    with pytest.raises(CacheMismatchError, match="240 bytes a block, but MambaSpec says 74"):
        canonicalize_shapes({"a": row, "m": row}, both)
