"""Chunked local attention, MLA and windows with sinks through the loop: what is held, stored and loaded."""

from __future__ import annotations

import numpy as np
import pytest
from toy_model import LOCAL, SINKS, ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.connector.store_plan import SkipReason
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.serving import EngineConfig, LLMEngine, Request, SamplingParams
from jaxkv.serving.cache_manager import CacheManager, blocks_of_step
from jaxkv.serving.chunking import Chunk
from jaxkv.serving.sizing import blocks_to_serve

BLOCK, MAX_LEN = 4, 120
KINDS = [("full", "local", "latent", "sink"), ("local", "sink", "state")]
MIXED = KINDS[0]


def make_engine(kinds=MIXED, **options):
    """Pools that hold the longest request and one block more."""
    model = ToyModel(kinds=kinds, max_model_len=MAX_LEN)
    blocks = {
        names[0].split(".")[0]: blocks_to_serve(spec, MAX_LEN, 1) + 1
        for names, spec in model.cache_groups(BLOCK)
    }
    config = make_config(model, BLOCK, **blocks)
    connector = OffloadingConnector(OffloadingConfig(host_bytes="8MiB", **options), config)
    engine_config = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    return share_programs(LLMEngine(model, config, engine_config, connector))


def expect(engine, prompts, num_new=6, *, return_logits=False):
    kinds = tuple(group.layer_names[0].split(".")[0] for group in engine.cache_config.groups)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=num_new, return_logits=return_logits))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.output_ids == oracle_tokens(prompt, num_new, kinds)
    return outputs


def close(engine):
    engine.flush()
    assert engine.connector.leaks() == []
    assert all(pool.num_free == pool.num_blocks for pool in engine._cache.pools)
    engine.shutdown()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_prompts_whose_blocks_are_gone_come_back_from_the_host(kinds, blocks_per_chunk):
    engine = make_engine(kinds, blocks_per_chunk=blocks_per_chunk)
    prompts = [random_prompt(seed, 101 + seed) for seed in range(4)]
    for prompt in prompts:
        expect(engine, [prompt])
    assert engine.stats.device_evictions > 0
    for prompt in prompts:
        metrics = expect(engine, [prompt])[0].metrics
        assert metrics.host_hit_tokens > 0
        assert metrics.device_hit_tokens + metrics.host_hit_tokens == (len(prompt) - 1) // BLOCK * BLOCK
    close(engine)


@pytest.mark.parametrize("length", [LOCAL * 2 + 1, 62])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_a_hit_from_the_host_gives_the_logits_of_the_same_hit_on_the_device(kinds, length):
    engine = make_engine(kinds)
    prompt = random_prompt(0, length)
    expect(engine, [prompt])
    device = expect(engine, [prompt], return_logits=True)[0]
    engine.reset_prefix_cache()
    host = expect(engine, [prompt], return_logits=True)[0]
    assert device.metrics.device_hit_tokens == host.metrics.host_hit_tokens == (length - 1) // BLOCK * BLOCK
    np.testing.assert_array_equal(np.stack(device.logits), np.stack(host.logits))
    close(engine)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_preemption_and_loads_in_pools_of_one_request_keep_the_tokens(kinds):
    engine = make_engine(kinds, offload_prompt_only=False)
    prompts = [random_prompt(seed, 30 + seed) for seed in range(4)]
    for _ in range(2):
        expect(engine, prompts, 30)
    assert engine.stats.num_preemptions > 0
    assert all(group.loaded_bytes > 0 for group in engine.connector.get_stats().groups)
    close(engine)


@pytest.mark.parametrize(
    ("length", "loaded"),
    [
        # 48 tokens are two attention chunks: the next token reads none of them. The window reads 3 blocks.
        (49, {"full": 12, "local": 0, "latent": 12, "sink": 2 + 3}),
        (57, {"full": 14, "local": 2, "latent": 14, "sink": 2 + 3}),
        (9, {"full": 2, "local": 2, "latent": 2, "sink": 2}),
    ],
)
def test_a_load_brings_only_the_chunks_the_next_token_reads(length, loaded):
    engine = make_engine()
    prompt = random_prompt(0, length)
    expect(engine, [prompt])
    engine.reset_prefix_cache()
    assert expect(engine, [prompt])[0].metrics.host_hit_tokens == length - 1
    groups = engine.connector.get_stats().groups
    assert {kind: group.loaded_chunks for kind, group in zip(MIXED, groups, strict=True)} == loaded
    close(engine)


def test_chunks_that_no_boundary_reads_are_not_stored():
    engine = make_engine()
    expect(engine, [random_prompt(0, 60)])
    groups = dict(zip(MIXED, engine.connector.get_stats().groups, strict=True))
    # A hit of 24 or of 48 tokens reads nothing of the local group, so blocks 5 and 11 serve no hit.
    assert groups["local"].stored_chunks == 15 - 2
    assert groups["local"].skipped_chunks == {SkipReason.UNREACHABLE: 2}
    assert [groups[kind].stored_chunks for kind in ("full", "latent", "sink")] == [15, 15, 15]
    close(engine)


def make_cache(kind, num_tokens):
    model = ToyModel(kinds=(kind,))
    request = Request(
        "r", range(num_tokens), SamplingParams(), chain=HashChain(ChainRoot("", 4)), arrival_s=0.0
    )
    cache = CacheManager(make_config(model, BLOCK, **{kind: 40}), 80)
    assert cache.admit(request, 0, 0, Chunk(0, 8, 8))
    cache.register(request, 8)
    return cache, request


def compute(cache, request, start, end):
    assert cache.extend(request, Chunk(start, end, 8))
    cache.register(request, end)


def held(cache, request):
    return [index for index, block in enumerate(cache.row(request, 0)) if block >= 0]


def test_a_window_with_sinks_gives_back_what_lies_between_them():
    assert SINKS == 6
    cache, request = make_cache("sink", 60)
    for start in range(8, 40, 8):
        compute(cache, request, start, start + 8)
    # The token at 32 reads sinks 0 to 5 and tokens 22 to 31.
    assert held(cache, request) == [0, 1, 5, 6, 7, 8, 9]
    sinks, window = blocks_of_step(cache.specs[0], Chunk(32, 40, 8), 60)
    assert [*sinks, *window] == held(cache, request)
    assert cache.pools[0].num_free == 40 - 7
    cache.release(request)
    assert cache.pools[0].num_free == 40
    assert cache.find_hit(request) == 40


def test_a_local_group_gives_back_an_attention_chunk_when_the_next_one_begins():
    cache, request = make_cache("local", 60)
    compute(cache, request, 8, 16)
    compute(cache, request, 16, 24)
    assert held(cache, request) == [0, 1, 2, 3, 4, 5]
    compute(cache, request, 24, 32)
    assert held(cache, request) == [6, 7]
    cache.release(request)
    assert cache.pools[0].num_free == 40


def test_a_block_no_hit_reads_is_not_cached():
    cache, request = make_cache("local", 60)
    compute(cache, request, 8, 24)
    assert cache.pools[0].num_cached == 5
    cache.release(request)
    assert cache.find_hit(request) == 48  # nothing is read at any multiple of the attention chunk


def test_a_local_hit_takes_no_block_behind_its_attention_chunk():
    cache, request = make_cache("local", 33)
    compute(cache, request, 8, 24)
    compute(cache, request, 24, 32)
    cache.release(request)
    assert cache.find_hit(request) == 32
    assert cache.admit(request, 32, 32, Chunk(32, 33, 1))
    assert held(cache, request) == [6, 7, 8]
