"""The host backend end to end over real arrays: bytes, failures as data, pools and their owners."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.errors import CacheMismatchError, ConfigError, PoolInUseError
from jaxkv.host_pool import HostPool
from jaxkv.keys import BlockHash, GroupId, JobId, make_offload_key
from jaxkv.offload import BackendOptions, DeviceBlocks, ReqContext, TransferJob, make_offloading_spec
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

CTX = ReqContext("r")
CONFIG = KVCacheConfig(
    (
        KVCacheGroupSpec(("kv.0", "kv.1"), FullAttentionSpec(4, 1, 8, np.float32), 6),
        KVCacheGroupSpec(("state",), MambaSpec(8, ((16, 16),), (np.float32,)), 4),
    )
)


def make_caches(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"kv.0": (6, 4, 2, 8), "kv.1": (6, 4, 2, 8), "state": (4, 16, 16)}
    return {name: jnp.asarray(random.random(shape, np.float32)) for name, shape in shapes.items()}


def copy_of(caches):
    return {name: np.array(leaf) for name, leaf in caches.items()}


@pytest.fixture
def spec():
    made = HostOffloadingSpec(BackendOptions(CONFIG, 1 << 20))
    yield made
    made.shutdown()


def keys_of(count, group):
    return [make_offload_key(BlockHash(bytes([number]) * 16), GroupId(group)) for number in range(count)]


def job(job_id, place, *groups):
    blocks = [DeviceBlocks(GroupId(group), np.array(ids, np.int32)) for group, ids in groups]
    return TransferJob(JobId(job_id), "r", blocks, place)


def store(spec, worker, caches, *groups):
    wanted = [key for group, ids in groups for key in keys_of(len(ids), group)]
    output = spec.get_manager().prepare_store(wanted, CTX)
    worker.submit_store(job(0, output.store_spec, *groups), caches)
    worker.wait([JobId(0)])
    (result,) = worker.get_finished()
    spec.get_manager().complete_store(wanted, CTX, success=result.error is None)
    return wanted, result


def test_restored_pages_of_every_group_equal_the_pages_offloaded(spec):
    caches = make_caches()
    before = copy_of(caches)
    worker = spec.get_worker(caches)
    keys, stored = store(spec, worker, caches, (0, [1, 4]), (1, [2]))
    assert (stored.error, stored.num_bytes) == (None, 2 * 2 * 256 + 1024)
    fresh = make_caches(1)
    expected = copy_of(fresh)
    for name in ("kv.0", "kv.1"):
        expected[name][[5, 0]] = before[name][[1, 4]]
    expected["state"][3] = before["state"][2]
    place = spec.get_manager().prepare_load(keys, CTX)
    fresh = worker.submit_load(job(1, place, (0, [5, 0]), (1, [3])), fresh)
    worker.wait([JobId(1)])
    (loaded,) = worker.get_finished()
    spec.get_manager().complete_load(keys, CTX)
    assert (loaded.job_id, loaded.error, loaded.num_bytes) == (1, None, stored.num_bytes)
    for name, leaf in copy_of(fresh).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_chunks_of_several_blocks_skip_what_is_not_kept():
    spec = HostOffloadingSpec(BackendOptions(CONFIG, 1 << 20, blocks_per_chunk=2))
    caches = make_caches()
    worker = spec.get_worker(caches)
    output = spec.get_manager().prepare_store(keys_of(2, 0), CTX)
    worker.submit_store(job(0, output.store_spec, (0, [1, 2, -1, 3])), caches)
    assert [result.num_bytes for result in worker.get_finished()] == [3 * 2 * 256]
    spec.get_manager().complete_store(keys_of(2, 0), CTX)
    spec.shutdown()


@pytest.mark.parametrize("bad", [6, -2, 10**6])
def test_bad_block_id_is_a_failed_job_and_the_caches_live_on(spec, bad):
    caches = make_caches()
    before = copy_of(caches)
    worker = spec.get_worker(caches)
    keys, _ = store(spec, worker, caches, (0, [1, 2]))
    place = spec.get_manager().prepare_load(keys, CTX)
    caches = worker.submit_load(job(1, place, (0, [3, bad])), caches)
    worker.submit_store(job(2, place, (0, [3, bad])), caches)
    worker.wait([JobId(1), JobId(2)])
    results = worker.get_finished()
    spec.get_manager().complete_load(keys, CTX)
    assert [result.job_id for result in results] == [1, 2]
    assert all(str(bad) in result.error for result in results)
    for name, leaf in copy_of(caches).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_failure_in_a_later_group_keeps_the_caches_of_the_earlier_one(spec):
    caches = make_caches()
    worker = spec.get_worker(caches)
    keys, _ = store(spec, worker, caches, (0, [1]), (1, [2]))
    place = spec.get_manager().prepare_load(keys, CTX)
    caches = worker.submit_load(job(1, place, (0, [3]), (1, [9])), caches)
    worker.wait([JobId(1)])
    assert "9" in worker.get_finished()[0].error
    spec.get_manager().complete_load(keys, CTX, success=False)
    assert all(np.isfinite(leaf).all() for leaf in copy_of(caches).values())


def test_closed_pool_is_a_failed_job():
    pool = HostPool(1 << 20)
    spec = HostOffloadingSpec(BackendOptions(CONFIG, 1), pool=pool)
    caches = make_caches()
    worker = spec.get_worker(caches)
    output = spec.get_manager().prepare_store(keys_of(1, 0), CTX)
    with pytest.raises(PoolInUseError):
        pool.close()
    worker.submit_store(job(0, output.store_spec, (0, [1])), caches)
    assert "closed" in worker.get_finished()[0].error
    spec.shutdown()


def test_two_connectors_over_one_pool_are_refused():
    options = BackendOptions(CONFIG, 1)
    with HostPool(1 << 20) as pool:
        first = HostOffloadingSpec(options, pool=pool)
        with pytest.raises(PoolInUseError, match="another connector"):
            HostOffloadingSpec(options, pool=pool)
        first.shutdown()
        HostOffloadingSpec(options, pool=pool).shutdown()


def test_pool_too_small_for_one_block_is_named():
    with pytest.raises(ConfigError, match="cannot hold one slot"):
        OffloadingConnector(OffloadingConfig(host_bytes="4KiB", blocks_per_chunk=16), CONFIG)


def test_pool_is_free_again_after_a_constructor_that_failed():
    with HostPool(4096) as pool:
        large = KVCacheConfig((KVCacheGroupSpec(("x",), MambaSpec(8, ((64, 64),), (np.float32,)), 4),))
        with pytest.raises(ConfigError):
            HostOffloadingSpec(BackendOptions(large, 1), pool=pool)
        HostOffloadingSpec(BackendOptions(CONFIG, 1), pool=pool).shutdown()


def test_option_the_host_backend_does_not_know_is_named():
    with pytest.raises(ConfigError, match="shards"):
        make_offloading_spec("host", BackendOptions(CONFIG, 1 << 20, extra={"shards": 2}))


def test_caches_of_another_shape_are_refused_at_registration(spec):
    caches = make_caches()
    caches["kv.0"] = jnp.zeros((6, 4, 2, 16), jnp.float32)
    with pytest.raises(CacheMismatchError):
        spec.get_worker(caches)


def test_connector_with_the_host_backend_shuts_its_pool_down():
    connector = OffloadingConnector(OffloadingConfig(host_bytes="1MiB"), CONFIG)
    pool = connector._spec.pool
    connector.register_kv_caches(make_caches())
    connector.shutdown()
    assert pool.closed
