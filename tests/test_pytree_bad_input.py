"""Arrays that cannot be a cache, or are no longer the cache that was registered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from jaxkv.canonical import canonicalize, canonicalize_shapes
from jaxkv.errors import CacheMismatchError, DeletedCacheError
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

P, S, H, D = 11, 4, 3, 5
BF16 = jnp.bfloat16
PACKED = (P, S, 2 * H, D)
FULL = FullAttentionSpec(S, H, D, BF16)


def config(*layers, spec=FULL, num_blocks=P):
    return KVCacheConfig((KVCacheGroupSpec(layers or ("a",), spec, num_blocks),))


def array(*sizes):
    return jnp.zeros(sizes, BF16)


@pytest.mark.parametrize(
    "leaf", [np.zeros(PACKED, BF16), jax.ShapeDtypeStruct(PACKED, BF16), 3], ids=["numpy", "struct", "int"]
)
def test_leaves_that_are_not_jax_arrays_are_refused(leaf):
    with pytest.raises(
        CacheMismatchError, match=r"layer 'a', leaf 0 is a .*every leaf must be a concrete jax\.Array"
    ):
        canonicalize({"a": leaf}, config())


def keys():
    return jax.random.split(jax.random.key(0), P)


@pytest.mark.parametrize("register", [canonicalize, canonicalize_shapes])
def test_arrays_that_hide_their_bytes_are_refused(register):
    message = r"layer 'a', leaf 1: key<fry> is not a dtype; give one that jax\.numpy knows"
    with pytest.raises(CacheMismatchError, match=message):
        register({"a": (array(*PACKED), keys())}, config())


def test_elements_of_one_bit_are_refused():
    leaf = jax.ShapeDtypeStruct((P, 8), jnp.uint1)
    with pytest.raises(CacheMismatchError, match="layer 'a', leaf 0: JAX runs no program on uint1"):
        canonicalize_shapes({"a": leaf}, config())


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
        (lambda k, v: {"a": (k, keys())}, "leaf 1: key<fry> is not a dtype"),
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
