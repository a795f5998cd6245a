"""A fingerprint tells apart what cached bytes mean, and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import canonicalize
from jaxkv.fingerprint import cache_fingerprint
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

FULL = KVCacheGroupSpec(("a", "b"), FullAttentionSpec(4, 2, 8, "bfloat16"), 10)
WINDOW = KVCacheGroupSpec(("c",), SlidingWindowSpec(4, 2, 8, "bfloat16", 16), 10)
STATE = KVCacheGroupSpec(("d",), MambaSpec(4, ((2, 3),), ("float32",)), 5)
CONFIG = KVCacheConfig((FULL, WINDOW, STATE))


def with_group(index, **changes):
    groups = list(CONFIG.groups)
    spec = replace(
        groups[index].spec, **{k: v for k, v in changes.items() if k not in {"layer_names", "num_blocks"}}
    )
    rest = {k: v for k, v in changes.items() if k in {"layer_names", "num_blocks"}}
    groups[index] = replace(groups[index], spec=spec, **rest)
    return KVCacheConfig(tuple(groups))


DIFFERENT = {
    "model": ("other", "1", CONFIG, ""),
    "weights": ("model", "2", CONFIG, ""),
    "a letter moved from model to weights": ("mode", "l1", CONFIG, ""),
    "layout": ("model", "1", CONFIG, "heads first"),
    "dtype of the same size": ("model", "1", with_group(0, dtype="float16"), ""),
    "block size": ("model", "1", with_group(0, block_size=8), ""),
    "heads and head size swapped": ("model", "1", with_group(0, num_kv_heads=8, head_size=2), ""),
    "stored page size": ("model", "1", with_group(0, page_size_bytes=512), ""),
    "window": ("model", "1", with_group(1, sliding_window=32), ""),
    "sinks": ("model", "1", with_group(1, sink_len=1), ""),
    "layer names": ("model", "1", with_group(0, layer_names=("a", "x")), ""),
    "layer order": ("model", "1", with_group(0, layer_names=("b", "a")), ""),
    "group order": ("model", "1", KVCacheConfig((WINDOW, FULL, STATE)), ""),
    "one group fewer": ("model", "1", KVCacheConfig((FULL, WINDOW)), ""),
    "state shape": ("model", "1", with_group(2, shapes=((3, 2),)), ""),
    "state dtype": ("model", "1", with_group(2, dtypes=("int32",)), ""),
}
SAME = {
    "other block counts": with_group(0, num_blocks=99),
    "dtype written otherwise": with_group(0, dtype=jnp.bfloat16),
    "page size spelled out": with_group(0, page_size_bytes=256),
    "numpy number": with_group(0, block_size=np.int64(4)),
    "padded state": with_group(2, page_size_padded=64),
    "room for drafted tokens": with_group(2, num_speculative_blocks=3),
}
OURS = cache_fingerprint("model", "1", CONFIG)


def test_no_two_of_these_are_equal():
    found = {OURS, *(cache_fingerprint(*case) for case in DIFFERENT.values())}
    assert len(found) == 1 + len(DIFFERENT)


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
def test_what_is_not_stored_does_not_matter(config):
    assert cache_fingerprint("model", "1", config) == OURS


def test_the_value_is_the_same_in_every_process():
    assert OURS == "29ed64f7687a9ca38e951233bb321ef8"


def layout_of(leaf, **options):
    group = KVCacheGroupSpec(("a",), FullAttentionSpec(4, 4, 8, "float32"), 10)
    return canonicalize({"a": leaf}, KVCacheConfig((group,)), **options).fingerprint


def test_layouts_with_the_same_page_share_and_others_do_not():
    split = layout_of(jnp.zeros((2, 10, 4, 4, 8), jnp.float32))
    in_page = layout_of(jnp.zeros((10, 2, 4, 4, 8), jnp.float32))
    interleaved = layout_of(jnp.zeros((10, 4, 8, 8), jnp.float32))
    assert split == in_page
    assert split != interleaved


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_portable_pages_have_one_fingerprint_for_every_tensor_parallel_degree():
    found = {}
    for portable in (True, False):
        for degree in (1, 2, 4):
            mesh = jax.make_mesh((degree,), ("tensor",), devices=jax.devices()[:degree])
            heads = jax.sharding.NamedSharding(mesh, jax.P(None, None, None, "tensor"))
            leaf = jax.device_put(jnp.zeros((10, 2, 4, 4, 8), jnp.float32), heads)
            found[portable, degree] = layout_of(leaf, portable_pages=portable)
    assert len({found[True, degree] for degree in (1, 2, 4)} | {found[False, 1]}) == 1
    assert len({found[False, degree] for degree in (1, 2, 4)}) == 3
