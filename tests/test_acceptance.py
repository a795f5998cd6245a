"""The main promise, on real models: what comes back from the host is what left, and it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxkv_models.weights import load_model

from jaxkv import OffloadingConfig
from jaxkv.keys import JobId
from jaxkv.offload import BackendOptions, OffloadingWorker, TransferJob
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.serving import EngineConfig, LLMEngine, RequestOutput, SamplingParams, build_engine
from jaxkv.testing import assert_same_bytes

DATA = Path(__file__).parent / "data"
BLOCK = 16
NEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """A model, prompts that do not fit its device cache together, and a cache that serves one at a time."""

    name: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    device_bytes: int
    host_bytes: int

    def __str__(self) -> str:
        return self.name


def reference_prompts(file: str, least: int) -> tuple[tuple[int, ...], ...]:
    cases = json.loads((DATA / file).read_text())["cases"]
    return tuple(tuple(case["prompt_ids"]) for case in cases if len(case["prompt_ids"]) >= least)


def tiny_prompts() -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(7)
    shared = rng.integers(3, 512, 96)
    lengths = (130, 193, 200, 257, 160, 177)
    own = [rng.integers(3, 512, length) for length in lengths]
    # The last two begin alike, so that one pass has device hits as well.
    own[4][:96], own[5][:96] = shared, shared
    return tuple(tuple(map(int, prompt)) for prompt in own)


CASES = [
    Case(
        "recurrent_gemma",
        str(DATA / "tiny_recurrent_gemma"),
        tiny_prompts(),
        160 << 10,
        16 << 20,
    ),
    Case("bamba", str(DATA / "tiny_bamba"), tiny_prompts(), 640 << 10, 32 << 20),
    Case(
        "gemma3_270m",
        "gemma3-270m",
        reference_prompts("gemma3_270m_reference.json", least=700),
        40 << 20,
        512 << 20,
    ),
]


@dataclass
class RecordingWorker(OffloadingWorker):
    """Keeps a NumPy copy of every block that is stored and compares what is loaded with it, byte for byte.

    All leaves of these models have their block axis first, so a block is ``leaf[block]``.
    """

    inner: OffloadingWorker
    group_layers: list[tuple[str, ...]]
    stored: dict[Any, list[bytes]] = field(default_factory=dict)
    num_compared: int = 0

    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        for slot, blocks in self._blocks(job, kv_caches):
            self.stored[slot] = blocks
        self.inner.submit_store(job, kv_caches)

    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        kv_caches = self.inner.submit_load(job, kv_caches)
        for slot, blocks in self._blocks(job, kv_caches):
            for expected, found in zip(self.stored[slot], blocks, strict=True):
                assert_same_bytes(found, expected)
                self.num_compared += 1
        return kv_caches

    def _blocks(self, job: TransferJob, kv_caches: Any) -> Iterator[tuple[Any, list[bytes]]]:
        slots = zip(job.spec.offsets.tolist(), job.spec.epochs.tolist(), strict=True)
        for blocks in job.blocks:
            for block in blocks.block_ids.tolist():
                layers = [kv_caches[name] for name in self.group_layers[blocks.group]]
                yield next(slots), [np.asarray(leaf[block]).tobytes() for layer in layers for leaf in layer]

    def get_finished(self):
        return self.inner.get_finished()

    def wait(self, job_ids: list[JobId]) -> None:
        self.inner.wait(job_ids)

    def shutdown(self) -> None:
        self.inner.shutdown()


def record_transfers(engine: LLMEngine) -> RecordingWorker:
    inner = engine.connector._worker._worker
    layers = [group.layer_names for group in engine.cache_config.groups]
    recorder = engine.connector._worker._worker = RecordingWorker(inner, layers)
    return recorder


def serve(engine: LLMEngine, prompt: tuple[int, ...], **options: Any) -> RequestOutput:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)
    (output,) = engine.generate([prompt], params)
    return output


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def make_engine(case: Case):
    model = load_model(case.model)
    longest = max(map(len, case.prompts)) + NEW_TOKENS

    def make(*, offload: bool) -> LLMEngine:
        return build_engine(
            model,
            device_bytes=case.device_bytes,
            max_tokens=longest,
            offloading=OffloadingConfig(case.host_bytes, offload_prompt_only=False) if offload else None,
            engine_config=EngineConfig(max_num_seqs=1),
        )

    return make


def test_second_pass_is_served_up_to_the_last_whole_chunk_with_the_same_tokens_and_bytes(case, make_engine):
    engine = make_engine(offload=True)
    recorder = record_transfers(engine)
    first = [serve(engine, prompt) for prompt in case.prompts]
    second = [serve(engine, prompt) for prompt in case.prompts]
    stats = engine.connector.get_stats()
    assert engine.connector.leaks() == []
    engine.shutdown()

    baseline_engine = make_engine(offload=False)
    baseline = [serve(baseline_engine, prompt) for prompt in case.prompts]
    baseline_engine.shutdown()

    for prompt, output in zip(case.prompts, second, strict=True):
        metrics = output.metrics
        hit = metrics.device_hit_tokens + metrics.host_hit_tokens
        assert hit == (len(prompt) - 1) // BLOCK * BLOCK
        assert hit + metrics.computed_tokens == metrics.prompt_tokens == len(prompt)
    assert sum(output.metrics.host_hit_tokens for output in second) > sum(map(len, case.prompts)) // 2
    assert [output.output_ids for output in second] == [output.output_ids for output in first]
    assert [output.output_ids for output in second] == [output.output_ids for output in baseline]
    assert recorder.num_compared > 0
    assert stats.loaded_bytes > 0
    assert engine.stats.device_evictions > 0


def test_a_hit_from_the_host_and_from_the_device_give_the_same_logits_bit_for_bit(case, make_engine):
    engine = make_engine(offload=True)
    prompt = case.prompts[0]
    serve(engine, prompt)
    from_device = serve(engine, prompt, return_logits=True)
    engine.reset_prefix_cache()
    from_host = serve(engine, prompt, return_logits=True)
    engine.shutdown()

    boundary = (len(prompt) - 1) // BLOCK * BLOCK
    assert from_device.metrics.device_hit_tokens == boundary
    assert from_host.metrics.host_hit_tokens == boundary
    assert len(from_host.logits) == NEW_TOKENS
    for on_device, on_host in zip(from_device.logits, from_host.logits, strict=True):
        assert_same_bytes(on_host.tobytes(), on_device.tobytes())


def test_host_options_reach_the_pool(make_engine, case):
    """The budget the acceptance runs are given is the pool's, exactly."""
    engine = make_engine(offload=True)
    spec = engine.connector._spec
    assert isinstance(spec, HostOffloadingSpec)
    assert spec.pool.capacity_bytes == case.host_bytes
    engine.shutdown()
    assert BackendOptions(engine.cache_config, case.host_bytes).host_bytes == case.host_bytes
