"""Invariants 14 and 15 of the connector: hits change no logit, and counters say why."""

from dataclasses import replace

import numpy as np
import pytest
from connector_loop import STATE_BLOCK, Loop
from engine_loop import LAYERS
from loop_tools import crowd, forget, no_room, skipped
from numpy_model import NumpyModel, NumpyPrograms, oracle_output
from toy_model import random_prompt

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.connector.lookup import Deferral
from jaxkv.offload import LookupResult
from jaxkv.offload.base import PrefixLookup
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.testing.leaks import assert_no_leaks

PROMPT = list(range(100, 150))
KINDS = [("full", "window", "state"), ("latent", "sink", "local"), ("full", "local", "state")]
PARAMS = SamplingParams(max_new_tokens=6, return_logits=True)


def make_engine(kinds, offloading=None):
    """An engine over arrays of JAX; with ``offloading`` its pages really go to host memory and back."""
    model = NumpyModel(tuple(LAYERS[kind] for kind in kinds), 128, on_device=True)
    config = model.cache_config((40,) * len(kinds))
    connector = offloading and OffloadingConnector(offloading, config)
    engine = LLMEngine(model, config, EngineConfig(prefill_shapes=(8, 32)), connector)
    engine._programs = NumpyPrograms(model)
    return engine


@pytest.mark.parametrize(
    ("kinds", "backend"), [*((kinds, "cpu") for kinds in KINDS), (KINDS[0], "xla")], ids=str
)
def test_invariant_14_a_hit_of_the_host_gives_the_logits_of_the_same_hit_of_the_device_bit_for_bit(
    kinds, backend
):
    engine = make_engine(kinds, OffloadingConfig(host_bytes="1MiB", transfer_backend=backend))
    prompt = random_prompt(0, 60)
    first = engine.generate([prompt], PARAMS)[0]
    device = engine.generate([prompt], PARAMS)[0]
    assert engine.connector.get_stats().loaded_bytes == 0
    engine.reset_prefix_cache()
    host = engine.generate([prompt], PARAMS)[0]
    assert device.metrics.device_hit_tokens == host.metrics.host_hit_tokens >= 56
    loaded = engine.connector.get_stats()
    assert all(group.loaded_bytes > 0 for group in loaded.groups), "bytes of every group came back"
    np.testing.assert_array_equal(np.stack(device.logits), np.stack(host.logits))
    np.testing.assert_array_equal(np.stack(first.logits), np.stack(host.logits))
    assert_no_leaks(engine.connector)
    engine.shutdown()


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_invariant_14_offloading_changes_no_token(kinds):
    prompts = [random_prompt(seed, 50 + seed) for seed in range(3)]
    offloading = OffloadingConfig(host_bytes="1MiB", offload_prompt_only=False)
    tokens = []
    for options in (None, offloading):
        engine = make_engine(kinds, options)
        outputs = engine.generate(prompts, PARAMS)
        engine.reset_prefix_cache()
        outputs += engine.generate(
            [[*prompt, *out.output_ids] for prompt, out in zip(prompts, outputs, strict=True)], PARAMS
        )
        tokens.append([output.output_ids for output in outputs])
        if options:
            assert engine.connector.get_stats().loaded_bytes > 0
        engine.shutdown()
    assert tokens[0] == tokens[1]
    assert tokens[0][0] == oracle_output(tuple(LAYERS[kind] for kind in kinds), prompts[0], PARAMS)


# -- 15 -------------------------------------------------------------------------------------------------


def counts(loop, name):
    return [getattr(group, name) for group in loop.connector.get_stats().groups]


def test_invariant_15_counters_say_what_was_stored_hit_and_loaded_with_bytes_and_seconds():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    get_finished = loop.worker.get_finished
    loop.worker.get_finished = lambda: [replace(result, elapsed_s=0.5) for result in get_finished()]
    loop.serve("first", PROMPT)
    stats = loop.connector.get_stats()
    assert counts(loop, "stored_chunks") == [12, 12, 6]
    assert counts(loop, "stored_bytes") == [12 * 2 * 32, 12 * 32, 6 * 16]
    assert (stats.queried_tokens, stats.hit_tokens) == (50, 0)
    assert stats.store_seconds == 0.5 * stats.store_sizes.num_values > 0
    loop.serve("second", PROMPT)
    stats = loop.connector.get_stats()
    assert counts(loop, "hit_chunks") == counts(loop, "loaded_chunks") == [12, 3, 1]
    assert counts(loop, "loaded_bytes") == [12 * 2 * 32, 3 * 32, 16]
    assert stats.loaded_bytes == 12 * 64 + 3 * 32 + 16
    assert (stats.queried_tokens, stats.hit_tokens) == (100, 48)
    assert (stats.load_seconds, stats.load_sizes.num_values) == (0.5, 1)
    assert [group.kind for group in stats.groups] == ["full_attention", "sliding_window", "mamba"]
    loop.close()


def test_invariant_15_counters_say_why_a_chunk_was_not_stored():
    loop = Loop(retention_interval=0)
    loop.serve("first", PROMPT)
    assert skipped(loop, 0) == {}
    assert skipped(loop, 1) == {"unreachable": 9}
    assert skipped(loop, 2) == {"no_state": 3, "unreachable": 2}
    loop.serve("second", PROMPT, kv_transfer_params={"offload_policy": "request_level"})
    assert skipped(loop, 0) == {"held": 12}
    with no_room(loop):
        loop.serve("third", [1, *PROMPT[:20]])
    assert skipped(loop, 0)["refused"] >= 5
    loop.close()


def test_invariant_15_counters_say_why_a_request_waited():
    loop = Loop()
    manager = loop.spec.get_manager()
    loop.worker.delayed = True
    loop.add("first", PROMPT)
    for _ in range(6):
        loop.step()
    second = loop.add("second", PROMPT)
    loop.step()
    loop.worker.finish()
    loop.step()
    loop.step()
    assert second.request_id in loop.loading
    loop.connector.get_num_new_matched_tokens(second, 0)
    loop.add("third", PROMPT)
    loop.step()
    manager.lookup_prefix = lambda keys, ctx: PrefixLookup(len(keys), LookupResult.RETRY)
    manager.lookup_suffix = manager.lookup_prefix
    loop.connector.get_num_new_matched_tokens(loop.add("fourth", [2, *PROMPT]), 0)
    del manager.lookup_prefix, manager.lookup_suffix
    deferred = loop.connector.get_stats().deferred
    assert deferred[Deferral.PENDING] == 2
    assert deferred[Deferral.IN_FLIGHT] == 1
    assert deferred[Deferral.LOADING] == 1
    assert deferred[Deferral.RETRY] == 1
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    stats = loop.connector.get_stats()
    assert stats.wait_seconds.num_values == 3, "second, third and fourth have waited"
    assert stats.lookup_seconds.num_values > 5
    loop.close()


def test_invariant_15_counters_say_what_failed_and_what_was_evicted_by_group():
    loop = Loop(pool_bytes=32 * 512, slab_bytes=4 * 512, max_step_tokens=24)
    loop.worker.fail = lambda _: "full disk"
    loop.serve("first", PROMPT[:25])
    assert counts(loop, "failed_store_chunks") == [6, 6, 1]
    assert counts(loop, "stored_chunks") == counts(loop, "stored_bytes") == [0, 0, 0]
    loop.worker.fail = lambda job: "gone" if job.req_id == "third" else None
    loop.serve("second", PROMPT[:25])
    loop.serve("third", PROMPT[:25])
    assert counts(loop, "failed_load_chunks") == [6, 3, 1]
    assert counts(loop, "loaded_bytes") == [0, 0, 0]
    for number in range(8):
        loop.serve(f"other {number}", [number, *PROMPT[:24]])
    evicted = counts(loop, "evicted_chunks")
    assert all(evicted)
    assert sum(evicted) == loop.connector.get_stats().backend.num_evicted
    loop.close()


def test_invariant_15_a_snapshot_of_the_counters_does_not_change_any_more():
    loop = Loop()
    loop.serve("first", PROMPT)
    before = loop.connector.get_stats()
    taken = (before.groups[0].stored_chunks, dict(before.groups[2].skipped_chunks), before.queried_tokens)
    loop.serve("second", [1, *PROMPT])
    crowd(loop, 1)
    forget(loop, loop.add("third", PROMPT), 0, [])
    assert taken == (
        before.groups[0].stored_chunks,
        dict(before.groups[2].skipped_chunks),
        before.queried_tokens,
    )
    loop.run()
    loop.close()
