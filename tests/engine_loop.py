"""The serving engine over NumPy caches and a fake pool, its tokens compared with an oracle's."""

from __future__ import annotations

from dataclasses import replace

from numpy_model import Layer, NumpyModel, NumpyPrograms, oracle_output

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.serving import EngineConfig, LLMEngine, RequestMetrics, SamplingParams
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec
from jaxkv.testing.leaks import assert_no_leaks

LAYERS = {
    "full": Layer("full", 4),
    "latent": Layer("latent", 4),
    "window": Layer("window", 4, 10),
    "sink": Layer("window", 4, 10, 6),
    "local": Layer("local", 4, 12),
    "state": Layer("state", 8),
}


class EngineLoop:
    """An engine with one layer of each of ``kinds``; ``worker`` holds jobs back while it is ``delayed``."""

    def __init__(
        self,
        kinds=("full", "window", "state"),
        *,
        num_blocks=64,
        tokens_per_hash=None,
        pool_bytes=1 << 20,
        engine=None,
        **options,
    ):
        self.layers = tuple(LAYERS[kind] for kind in kinds)
        model = NumpyModel(self.layers, 128, on_device=False)
        counts = num_blocks if isinstance(num_blocks, tuple) else (num_blocks,) * len(kinds)
        self.config = replace(model.cache_config(counts), tokens_per_hash=tokens_per_hash)
        self.pool = FakePool(pool_bytes)
        self.spec = FakeOffloadingSpec(
            self.config, self.pool, blocks_per_chunk=options.get("blocks_per_chunk", 1)
        )
        self.worker = self.spec.worker
        self.connector = OffloadingConnector(
            OffloadingConfig(host_bytes=1, **options), self.config, spec=self.spec
        )
        self.engine = LLMEngine(
            model, self.config, engine or EngineConfig(prefill_shapes=(8, 32)), self.connector
        )
        self.engine._programs = NumpyPrograms(model)
        self.cache = self.engine._cache
        self.scheduler = self.engine._scheduler
        self._params: dict[str, tuple[list[int], SamplingParams]] = {}
        self.metrics: dict[str, RequestMetrics] = {}

    def add(self, name: str, prompt, num_new=1, *, reads_caches=True, **more) -> str:
        """Queue a request."""
        params = SamplingParams(max_new_tokens=num_new, skip_reading_prefix_cache=not reads_caches)
        self._params[name] = list(prompt), params
        return self.engine.add_request(self._params[name][0], params, name, **more)

    def step(self) -> None:
        """One step; the tokens of who finished are the oracle's."""
        for output in self.engine.step():
            prompt, params = self._params[output.request_id]
            assert output.output_ids == oracle_output(self.layers, prompt, params), output.request_id
            self.metrics[output.request_id] = output.metrics

    def run(self) -> None:
        """Steps until nobody wants a token and the connector rests."""
        for _ in range(1000):
            if not (self.engine.has_unfinished_requests or self.scheduler.has_loose_ends):
                return
            self.step()
        raise AssertionError("the engine does not come to rest")

    def serve(self, name: str, prompt, num_new=1, *, forget=True, **more) -> RequestMetrics:
        """Serve one request to its end, before which the device forgets all it computed."""
        if forget:
            self.engine.reset_prefix_cache()
        self.add(name, prompt, num_new, **more)
        self.run()
        return self.metrics[name]

    def close(self) -> None:
        """Nothing runs, so nothing is held."""
        self.run()
        assert_no_leaks(self.connector)
        assert len(self.pool.live) == self.connector.get_stats().backend.num_chunks
        for pool in self.cache.pools:
            assert pool.num_free == pool.num_blocks, "blocks were lost"
        self.engine.shutdown()
        assert not self.pool.live
