"""Specs refuse what cannot work and count bytes by bits."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.errors import ConfigError
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    dtype_bits,
    page_size_bytes,
)

FULL = FullAttentionSpec(16, 4, 64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (jnp.float32, 32),
        (jnp.bfloat16, 16),
        (jnp.float8_e4m3fn, 8),
        (jnp.int8, 8),
        (jnp.bool_, 8),
        (jnp.complex64, 64),
        (jnp.int4, 4),
        (jnp.uint4, 4),
        (jnp.float4_e2m1fn, 4),
        (jnp.int2, 2),
        (jnp.float6_e2m3fn, 8),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else jnp.dtype(value).name,
)
def test_dtype_bits_are_those_of_the_stored_element(dtype, bits):
    assert dtype_bits(dtype) == bits


def test_page_of_attention_is_k_and_v_of_every_token():
    assert page_size_bytes(FULL) == 2 * 16 * 4 * 64 * 2
    assert page_size_bytes(SlidingWindowSpec(16, 4, 64, jnp.int4, sliding_window=9)) == 16 * 4 * 64
    local = ChunkedLocalAttentionSpec(16, 4, 64, jnp.bfloat16, attention_chunk_size=8192)
    assert page_size_bytes(local) == page_size_bytes(FULL)


def test_page_counts_a_v_head_of_its_own_size():
    spec = FullAttentionSpec(16, 4, 192, jnp.bfloat16, head_size_v=128)
    assert page_size_bytes(spec) == 16 * 4 * (192 + 128) * 2


def test_page_of_mla_is_one_latent_row_of_every_token():
    assert page_size_bytes(MLAAttentionSpec(64, 576, jnp.bfloat16)) == 64 * 576 * 2
    assert page_size_bytes(MLAAttentionSpec(64, 576, jnp.uint8, page_size_bytes=64 * 656)) == 64 * 656


def test_stored_page_size_replaces_the_implied_one():
    assert page_size_bytes(FullAttentionSpec(16, 4, 64, jnp.bfloat16, page_size_bytes=20_000)) == 20_000


def test_page_of_a_state_leaves_out_the_padding_of_its_row():
    spec = MambaSpec(8, ((3, 7), (2, 4, 5)), (jnp.bfloat16, jnp.float32), page_size_padded=4096)
    assert page_size_bytes(spec) == 3 * 7 * 2 + 2 * 4 * 5 * 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FullAttentionSpec(0, 4, 64, jnp.bfloat16), "FullAttentionSpec.block_size must be"),
        (lambda: FullAttentionSpec(16.0, 4, 64, jnp.bfloat16), "block_size must be an integer .* got 16.0"),
        (lambda: FullAttentionSpec(16, -1, 64, jnp.bfloat16), "num_kv_heads .* got -1"),
        (lambda: FullAttentionSpec(16, 4, 0, jnp.bfloat16), "head_size"),
        (lambda: FullAttentionSpec(16, 4, 64, "bfloat17"), "'bfloat17' is not a dtype"),
        (lambda: FullAttentionSpec(16, 4, 64, None), "name the dtype"),
        (lambda: FullAttentionSpec(16, 4, 64, "bfloat17", page_size_bytes=64), "'bfloat17' is not a dtype"),
        (lambda: FullAttentionSpec(16, 4, 64, jnp.bfloat16, page_size_bytes=0), "page_size_bytes"),
        (lambda: SlidingWindowSpec(16, 4, 64, jnp.bfloat16, sliding_window=0), "sliding_window"),
        (
            lambda: SlidingWindowSpec(16, 4, 64, jnp.bfloat16, sliding_window=9, sink_len=-1),
            "SlidingWindowSpec.sink_len must be an integer of at least 0, got -1",
        ),
        (
            lambda: ChunkedLocalAttentionSpec(16, 4, 64, jnp.bfloat16, attention_chunk_size=0),
            "ChunkedLocalAttentionSpec.attention_chunk_size must be .* got 0",
        ),
        (lambda: FullAttentionSpec(16, 4, 64, jnp.bfloat16, head_size_v=0), "head_size_v .* got 0"),
        (lambda: MLAAttentionSpec(16, 0, jnp.bfloat16), "MLAAttentionSpec.head_size .* got 0"),
        (lambda: MLAAttentionSpec(16, 8, jnp.uint1), "no program on uint1; .* bool or uint8"),
        (lambda: MLAAttentionSpec(1, 3, jnp.int4), "12 bits, not whole bytes"),
        (lambda: MambaSpec(16, ((2,),), (jnp.float32,), num_speculative_blocks=-1), "at least 0, got -1"),
        (lambda: MambaSpec(16, (), ()), "0 shapes"),
        (lambda: MambaSpec(16, [(2,)], (jnp.float32,)), r"a tuple of tuples, got \[\(2,\)\]"),
        (lambda: MambaSpec(16, ([2],), (jnp.float32,)), r"a tuple of tuples, got \(\[2\],\)"),
        (lambda: MambaSpec(16, ((2.0,),), (jnp.float32,)), r"every axis .* got \(\(2.0,\),\)"),
        (lambda: MambaSpec(16, ((2,),), (jnp.float32,), page_size_padded="8"), "page_size_padded .* got '8'"),
        (lambda: MambaSpec(16, ((2,),), (jnp.float32, jnp.float32)), "1 shapes and 2 dtypes"),
        (lambda: MambaSpec(16, ((2, 0),), (jnp.float32,)), "every axis"),
        (lambda: MambaSpec(16, ((3,),), (jnp.int4,)), "12 bits, not whole bytes"),
        (lambda: MambaSpec(16, ((4,),), (jnp.float32,), page_size_padded=15), "15, less than .* 16 bytes"),
        (lambda: KVCacheGroupSpec((), FULL, 4), "at least one layer"),
        (lambda: KVCacheGroupSpec(("a", "a"), FULL, 4), "named twice"),
        (lambda: KVCacheGroupSpec(("a",), FULL, 0), "num_blocks"),
        (lambda: KVCacheConfig(()), "at least one group"),
        (
            lambda: KVCacheConfig((KVCacheGroupSpec(("a",), FULL, 4), KVCacheGroupSpec(("a", "b"), FULL, 4))),
            r"more than one group: \['a'\]",
        ),
    ],
)
def test_a_spec_that_cannot_work_is_refused_with_the_reason(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_group_page_is_the_pages_of_its_layers():
    assert KVCacheGroupSpec(("a", "b", "c"), FULL, 4).page_size_bytes == 3 * page_size_bytes(FULL)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_block_sizes_fit_between_hash_block_and_alignment(block_sizes):
    config = KVCacheConfig(
        tuple(
            KVCacheGroupSpec((f"layer{i}",), FullAttentionSpec(size, 1, 8, jnp.float32), 2)
            for i, size in enumerate(block_sizes)
        )
    )
    for size in block_sizes:
        assert size % config.hash_block_size == 0
        assert config.alignment_tokens % size == 0
