"""Bad input that shows only in the assembled engine: a host pool closed, shared or too small."""

from __future__ import annotations

import pytest
from toy_model import ToyModel, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.errors import ConfigError, ConnectorStateError, PoolClosedError, PoolInUseError
from jaxkv.host_pool import HostPool
from jaxkv.offload import BackendOptions
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams, build_engine

PARAMS = SamplingParams(max_new_tokens=4)
CONFIG = make_config(ToyModel(), 4, full=40, window=16, state=6)


def make_engine(pool):
    spec = HostOffloadingSpec(BackendOptions(CONFIG, 1), pool=pool)
    connector = OffloadingConnector(OffloadingConfig(host_bytes=1), CONFIG, spec=spec)
    options = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    return share_programs(LLMEngine(ToyModel(), CONFIG, options, connector))


def test_an_engine_whose_host_pool_was_closed_says_so_and_keeps_its_requests_until_they_are_aborted():
    pool = HostPool(1 << 20)
    engine = make_engine(pool)
    engine.generate([random_prompt(0, 50)], PARAMS)
    with pytest.raises(PoolInUseError):
        pool.close()
    request_id = engine.add_request(random_prompt(1, 50), PARAMS)
    engine.step()
    with pytest.raises(PoolClosedError, match="the host pool was closed; open a new one"):
        engine.step()
    assert engine.has_unfinished_requests
    assert engine.abort(request_id) is not None
    assert all(block_pool.num_free == block_pool.num_blocks for block_pool in engine._cache.pools)
    engine.shutdown()
    with pytest.raises(ConnectorStateError, match="was shut down; make a new one"):
        engine.connector.get_stats()


def test_a_shutdown_that_cannot_finish_its_work_frees_the_pool_all_the_same(monkeypatch):
    with HostPool(1 << 20) as pool:
        engine = make_engine(pool)
        engine.add_request(random_prompt(0, 50), PARAMS)
        engine.step()
        monkeypatch.setattr(engine.connector, "handle_preemptions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.shutdown()
        assert pool.used_bytes == 0
        make_engine(pool).shutdown()


def test_two_engines_cannot_share_a_host_pool():
    with HostPool(1 << 20) as pool:
        engine = make_engine(pool)
        with pytest.raises(PoolInUseError, match="shut that one down first, or give each a pool of its own"):
            make_engine(pool)
        engine.shutdown()
        make_engine(pool).shutdown()


def test_host_bytes_too_small_for_one_block_name_what_would_do():
    offloading = OffloadingConfig(host_bytes=100, blocks_per_chunk=512)
    with pytest.raises(ConfigError, match=r"cannot hold one slot of .* give it at least that"):
        build_engine(ToyModel(), device_bytes=1 << 20, max_tokens=200, offloading=offloading)


def test_device_bytes_too_small_for_one_request_name_what_would_do():
    with pytest.raises(ConfigError, match=r"100 device bytes cannot serve .* bytes would suffice"):
        build_engine(ToyModel(), device_bytes=100, max_tokens=200)


def test_blocks_of_sizes_that_do_not_divide_each_other_are_served():
    """No block size is refused: an equal prompt is served to its last link, whatever blocks that cuts."""
    model = ToyModel(size_factors=(("full", 2), ("state", 3)))
    config = make_config(model, 4, full=30, window=20, state=12)
    connector = OffloadingConnector(OffloadingConfig(host_bytes="1MiB"), config)
    options = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=2)
    engine = share_programs(LLMEngine(model, config, options, connector))
    prompt = random_prompt(0, 60)
    for _ in range(2):
        output = engine.generate([prompt], PARAMS)[0]
        assert output.output_ids == oracle_tokens(prompt, 4)
        engine.reset_prefix_cache()
    assert output.metrics.host_hit_tokens == 56
    engine.shutdown()
