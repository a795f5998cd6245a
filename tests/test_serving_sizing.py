"""Device bytes become block counts that never exceed the ceiling and always serve the promised request."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ToyModel, oracle_tokens, random_prompt

from jaxkv.errors import ConfigError
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams, divide_device_bytes
from jaxkv.serving.cache_manager import blocks_of_step
from jaxkv.serving.chunking import Chunk
from jaxkv.serving.sizing import blocks_to_serve
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

FULL = FullAttentionSpec(16, 1, 256, jnp.float32)
WINDOW = SlidingWindowSpec(16, 1, 256, jnp.float32, 512)
STATE = MambaSpec(16, ((8, 4), (16,)), (jnp.float32, jnp.float32))
GROUPS = [(("f0", "f1"), FULL), (("w0",), WINDOW), (("s0", "s1", "s2"), STATE)]
PAGE_BYTES = [2 * 2 * 16 * 256 * 4, 2 * 16 * 256 * 4, 3 * (8 * 4 + 16) * 4]
# 1,500 tokens: 94 blocks; a window of 512 and a chunk of 32: 34 blocks; two states.
LEAST_BYTES = 94 * PAGE_BYTES[0] + 34 * PAGE_BYTES[1] + 2 * PAGE_BYTES[2]


def total_bytes(config):
    return sum(group.num_blocks * page for group, page in zip(config.groups, PAGE_BYTES, strict=True))


def test_the_least_budget_gives_each_group_what_a_request_cannot_do_without():
    config = divide_device_bytes(GROUPS, LEAST_BYTES, 1500)
    assert [group.num_blocks for group in config.groups] == [94, 34, 2]


def test_one_byte_less_is_refused_with_the_bytes_that_would_suffice():
    with pytest.raises(ConfigError, match=f"{LEAST_BYTES} bytes would suffice"):
        divide_device_bytes(GROUPS, LEAST_BYTES - 1, 1500)


@given(extra=st.integers(0, 300_000_000), max_tokens=st.integers(1, 1500))
def test_the_pages_never_exceed_the_ceiling_and_little_is_left(extra, max_tokens):
    config = divide_device_bytes(GROUPS, LEAST_BYTES + extra, max_tokens)
    used = total_bytes(config)
    assert used <= LEAST_BYTES + extra
    counts = [group.num_blocks for group in config.groups]
    least = [blocks_to_serve(spec, max_tokens, 32) for _, spec in GROUPS]
    assert all(count >= need for count, need in zip(counts, least, strict=True))
    if extra > 100_000_000:
        assert used > 0.9 * (LEAST_BYTES + extra)


@given(
    block_size=st.integers(1, 8),
    size=st.integers(1, 40),
    sinks=st.integers(0, 30),
    num_tokens=st.integers(1, 500),
)
def test_no_step_holds_more_blocks_than_a_request_is_said_to_need(block_size, size, sinks, num_tokens):
    window = SlidingWindowSpec(block_size, 1, 8, jnp.float32, size, sink_len=sinks)
    local = ChunkedLocalAttentionSpec(block_size, 1, 8, jnp.float32, size)
    for spec in (window, local, MLAAttentionSpec(block_size, 8, jnp.float32)):
        steps = [Chunk(start, start + 1, 1) for start in range(num_tokens)]
        most = max(sum(map(len, blocks_of_step(spec, chunk, num_tokens))) for chunk in steps)
        needed = blocks_to_serve(spec, num_tokens, chunk_tokens=1)
        assert most <= needed
        if num_tokens > 400:  # long enough for every place a window or an attention chunk can have in blocks
            assert most == needed


@pytest.mark.parametrize(
    ("size", "chunk_tokens", "num_blocks"), [(64, 1, 4), (64, 32, 6), (64, 33, 6), (60, 1, 5), (7, 1, 2)]
)
def test_chunked_local_attention_needs_an_attention_chunk_and_a_step(size, chunk_tokens, num_blocks):
    spec = ChunkedLocalAttentionSpec(16, 1, 8, jnp.float32, size)
    assert blocks_to_serve(spec, 5000, chunk_tokens) == num_blocks
    chunks = [Chunk(n, n + chunk_tokens, 64) for n in range(1000)]
    held = [sum(map(len, blocks_of_step(spec, chunk, 5000))) for chunk in chunks]
    assert max(held) == num_blocks


def test_a_recurrent_layer_needs_slots_for_drafted_tokens_beside_its_two_states():
    spec = MambaSpec(16, ((2,),), (jnp.float32,), num_speculative_blocks=3)
    assert blocks_to_serve(spec, 500, 32) == 5
    assert blocks_to_serve(spec, 16, 32) == 4
    config = divide_device_bytes([(("s",), spec)], 5 * 8, 500, (500,))
    assert config.groups[0].num_blocks == 5


@pytest.mark.parametrize("args", [(0, (32,)), (10, ()), (10, (0, 32))])
def test_sizes_that_mean_nothing_are_refused(args):
    with pytest.raises(ConfigError, match="must be at least 1"):
        divide_device_bytes(GROUPS, LEAST_BYTES, *args)


def test_the_least_budget_serves_its_request():
    model = ToyModel()
    shapes = (8, 32)
    prompt = random_prompt(0, 100)
    page_bytes = (2 * 4 * 4, 2 * 4 * 4, 2 * 4)
    least = 27 * page_bytes[0] + 7 * page_bytes[1] + 2 * page_bytes[2]
    config = divide_device_bytes(model.cache_groups(4), least, 107, shapes)
    engine = LLMEngine(model, config, EngineConfig(prefill_shapes=shapes))
    for _ in range(2):
        assert engine.generate([prompt], SamplingParams(max_new_tokens=7))[0].output_ids == oracle_tokens(
            prompt, 7
        )
