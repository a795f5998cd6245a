"""The example backend of the docs, under the real engine."""

from __future__ import annotations

import pytest
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.testing.leaks import assert_no_leaks

KINDS = ("full", "window", "state")


def make_engine(host_bytes, **options):
    model = ToyModel(kinds=KINDS)
    config = make_config(model, 4, full=31, window=14, state=4)
    options = OffloadingConfig(host_bytes, backend="dict_backend.DictSpec", **options)
    connector = OffloadingConnector(options, config)
    return share_programs(
        LLMEngine(model, config, EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3), connector)
    )


def serve(engine, prompts):
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [output.output_ids for output in outputs] == [oracle_tokens(prompt, 6) for prompt in prompts]
    return outputs


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_prompts_come_back_from_the_dictionary(blocks_per_chunk):
    engine = make_engine("1MiB", blocks_per_chunk=blocks_per_chunk)
    prompts = [random_prompt(seed, 60 + seed) for seed in range(4)]
    serve(engine, prompts)
    engine.reset_prefix_cache()
    for prompt, output in zip(prompts, serve(engine, prompts), strict=True):
        metrics = output.metrics
        assert metrics.host_hit_tokens > 0
        if blocks_per_chunk == 1:
            assert metrics.host_hit_tokens + metrics.device_hit_tokens == (len(prompt) - 1) // 4 * 4
    engine.flush()
    assert_no_leaks(engine.connector)
    engine.shutdown()


def test_a_small_dictionary_evicts_and_keeps_the_tokens():
    engine = make_engine(1500)
    for seed in range(5):
        prompt = random_prompt(seed, 40 + seed)
        serve(engine, [prompt])
        engine.reset_prefix_cache()
        serve(engine, [prompt])
    engine.flush()
    stats = engine.connector.get_stats()
    assert stats.evicted_chunks > 0
    assert stats.loaded_bytes > 0
    assert_no_leaks(engine.connector)
    engine.shutdown()


def test_a_reset_forgets_everything_and_later_prompts_are_stored_again():
    engine = make_engine("1MiB")
    prompt = random_prompt(0, 50)
    serve(engine, [prompt])
    engine.connector.reset_cache()
    engine.reset_prefix_cache()
    assert serve(engine, [prompt])[0].metrics.host_hit_tokens == 0
    engine.reset_prefix_cache()
    assert serve(engine, [prompt])[0].metrics.host_hit_tokens == 48
    engine.shutdown()


def test_a_chunk_that_is_gone_or_damaged_is_recomputed():
    engine = make_engine("1MiB")
    prompt = random_prompt(0, 50)
    for damage in (lambda data, key: data.pop(key), lambda data, key: data.update({key: b"no zlib"})):
        serve(engine, [prompt])
        engine.reset_prefix_cache()
        data = engine.connector._spec._data
        damage(data, next(iter(data)))
        serve(engine, [prompt])
    engine.flush()
    assert sum(group.failed_load_chunks for group in engine.connector.get_stats().groups) > 0
    assert_no_leaks(engine.connector)
    engine.shutdown()
