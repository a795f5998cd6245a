"""The connector and the host backend under the serving engine: real arrays and copies, an oracle's tokens."""

import pytest
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.testing.leaks import assert_no_leaks

KINDS = [("full",), ("full", "window"), ("full", "window", "state")]
TIGHT = {"full": 30, "window": 14, "state": 4}


def make_engine(kinds, **options):
    model = ToyModel(kinds=kinds)
    config = make_config(model, 4, **TIGHT)
    connector = OffloadingConnector(OffloadingConfig(**{"host_bytes": "1MiB"} | options), config)
    engine_config = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    return share_programs(LLMEngine(model, config, engine_config, connector)), connector


def expect_tokens(engine, kinds, prompts, num_new=6):
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=num_new))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.output_ids == oracle_tokens(prompt, num_new, kinds)
    return [output.metrics for output in outputs]


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_evicted_prompts_come_back_from_the_host(kinds, backend):
    engine, connector = make_engine(kinds, transfer_backend=backend)
    prompts = [random_prompt(seed, 70 + seed) for seed in range(4)]
    expect_tokens(engine, kinds, prompts)
    engine.reset_prefix_cache()
    for prompt in prompts:
        metrics = expect_tokens(engine, kinds, [prompt])[0]
        assert metrics.device_hit_tokens + metrics.host_hit_tokens == (len(prompt) - 1) // 4 * 4
        assert metrics.host_hit_tokens > 0
    engine.flush()
    assert connector.get_stats().loaded_bytes > 0
    assert_no_leaks(connector)
    engine.shutdown()


def test_small_host_pool_under_pressure_keeps_the_tokens():
    kinds = KINDS[-1]
    engine, connector = make_engine(kinds, host_bytes="64KiB", offload_prompt_only=False)
    prompts = [random_prompt(seed % 5, 40 + 7 * (seed % 5)) for seed in range(15)]
    expect_tokens(engine, kinds, prompts, num_new=9)
    engine.flush()
    assert connector.get_stats().evicted_chunks > 0
    assert_no_leaks(connector)
    engine.shutdown()
