"""After warm-up nothing reaches XLA's compiler any more: neither steps nor transfers of any length."""

from __future__ import annotations

from contextlib import contextmanager

import jax
import pytest
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams

EVENT = "/jax/core/compile/backend_compile_duration"
KINDS = ("full", "window", "state")


@contextmanager
def count_backend_compilations():
    """Yields a list that gets one entry for every program XLA compiles."""
    compiled: list[str] = []

    def note(event, _seconds, **_details):
        if event == EVENT:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_the_counter_sees_a_compilation():
    with count_backend_compilations() as compiled:
        jax.jit(lambda x: x * 3 + 7)(1.5)
    assert compiled


@pytest.mark.parametrize("transfer_backend", ["cpu", "xla"])
def test_nothing_is_compiled_after_warmup_whatever_length_is_loaded(transfer_backend):
    config = make_config(ToyModel(kinds=KINDS), 4, full=64, window=30, state=12)
    options = OffloadingConfig("8MiB", transfer_backend=transfer_backend, offload_prompt_only=False)
    connector = OffloadingConnector(options, config)
    engine_config = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3, max_model_len=160)
    engine = share_programs(LLMEngine(ToyModel(kinds=KINDS), config, engine_config, connector))
    engine.warmup()
    with count_backend_compilations() as compiled:
        for length in (3, 9, 17, 30, 41, 66, 95, 121):
            prompt = random_prompt(length, length)
            for temperature in (0.0, 1e8):
                params = SamplingParams(max_new_tokens=5, temperature=temperature)
                output = engine.generate([prompt, prompt[:-1]], params)[0]
                assert temperature or output.output_ids == oracle_tokens(prompt, 5, KINDS)
                engine.reset_prefix_cache()
        assert compiled == []
    assert engine.connector.get_stats().loaded_bytes > 0
    engine.shutdown()
