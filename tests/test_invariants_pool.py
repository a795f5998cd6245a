"""Invariants 10 and 12 of the connector: a full pool is a miss, and one budget of bytes serves all sizes."""

import gc
import random

import numpy as np
import pytest
from connector_loop import BLOCK, STATE_BLOCK, Loop, expected_output
from loop_tools import CTX, crowd, held, holds, no_room, skipped
from numpy_model import Layer, NumpyModel, NumpyPrograms, oracle_output
from toy_model import random_prompt

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.errors import ConfigError
from jaxkv.host_pool import HostPool, load_native
from jaxkv.keys import BlockHash, GroupId, make_offload_key
from jaxkv.offload import LookupResult
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.serving import EngineConfig, SamplingParams, build_engine
from jaxkv.slabs import slot_stride
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing.fake_pool import FakePool

PROMPT = list(range(100, 150))
KV, STATE = 0, 1
SLOT_BYTES = (3000, 20_000)
STRIDES = tuple(map(slot_stride, SLOT_BYTES))


def keys(group, first, count):
    return [
        make_offload_key(BlockHash(number.to_bytes(16, "big")), GroupId(group))
        for number in range(first, first + count)
    ]


def make_manager(num_states=8):
    """A manager of two sizes over a pool that holds so many states and nothing else."""
    pool = FakePool(STRIDES[STATE] * num_states)
    return HostOffloadingManager(pool, SLOT_BYTES), pool


def store(manager, wanted):
    """Store keys; whether there was room for them."""
    output = manager.prepare_store(wanted, CTX)
    if output is None:
        return False
    manager.complete_store(output.keys_to_store, CTX)
    return True


def num_held(manager, wanted):
    return sum(manager.lookup(key, CTX) is LookupResult.HIT for key in wanted)


def test_invariant_10_a_full_pool_is_a_miss_and_the_request_never_notices():
    """Every chunk of the pool is being loaded, for ever as it seems; others run, store nothing and end."""
    loop = Loop(pool_bytes=16 * 512, slab_bytes=4 * 512, max_step_tokens=24)
    first = loop.serve("first", PROMPT[:25])
    loop.worker.delayed = True
    second = loop.add("second", PROMPT[:26])
    loop.step()
    loop.worker.delayed = False
    for number in range(3):
        loop.add(f"other {number}", [number, *PROMPT[:30]], 3)
    for _ in range(20):
        loop.step()
        assert second.request_id in loop.loading
        assert max(held(loop, first, 0)) == max(held(loop, first, 1)) == 24, "in flight, never evicted"
        assert holds(loop, first, 2, 24)
    for number in range(3):
        assert loop.outputs[f"other {number}"] == expected_output([number, *PROMPT[:30]], 3)
    assert skipped(loop, 0)["refused"]
    loop.worker.finish()
    loop.run()
    assert loop.outputs["second"] == expected_output(PROMPT[:26], 1)
    loop.close()


def test_invariant_10_chunks_being_stored_are_not_evicted():
    loop = Loop(pool_bytes=16 * 512, slab_bytes=4 * 512, max_step_tokens=24)
    loop.worker.delayed = True
    first = loop.add("first", PROMPT[:25])
    for _ in range(4):
        loop.step()
    assert first.done
    slots = loop.pool.live
    assert len(slots) == 13
    crowd(loop, 1)
    assert slots <= loop.pool.live
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert loop.serve("again", PROMPT[:25]).host_hits == [24]
    loop.close()


def test_invariant_10_keys_being_stored_are_not_evicted_to_make_room_for_themselves():
    """A prompt's first chunks are held, oldest of all; to store the whole would take evicting them."""
    manager, _ = make_manager()
    wanted = keys(STATE, 0, 12)
    assert store(manager, wanted[:4])
    assert store(manager, keys(STATE, 100, 4))
    assert not store(manager, wanted)
    assert num_held(manager, wanted[:4]) == 4, "a refusal changes nothing"
    assert num_held(manager, keys(STATE, 100, 4)) == 4
    assert store(manager, wanted[:8])
    assert num_held(manager, wanted[:8]) == 8, "others make room"
    assert num_held(manager, keys(STATE, 100, 4)) == 0


def test_invariant_10_a_slab_with_a_chunk_in_flight_is_not_emptied_for_another_size():
    """Two slabs of token chunks, of each of which one is being loaded or written: no state fits."""
    manager, pool = make_manager(2)
    per_slab = pool.max_slots(SLOT_BYTES[KV]) // 2
    first, second = keys(KV, 0, per_slab), keys(KV, 100, per_slab)
    assert store(manager, first)
    manager.prepare_load(first[:1], CTX)
    assert store(manager, second[1:])
    assert manager.prepare_store(second[:1], CTX) is not None
    assert not store(manager, keys(STATE, 0, 1))
    assert num_held(manager, first) == per_slab
    manager.complete_load(first[:1], CTX)
    assert store(manager, keys(STATE, 0, 1)), "one that nobody uses can go"
    assert num_held(manager, first) == 0
    manager.complete_store(second[:1], CTX)
    assert num_held(manager, second) == per_slab


def test_invariant_10_the_slab_of_keys_that_are_offered_is_not_emptied_for_others_of_the_offer():
    manager, pool = make_manager(2)
    per_slab = pool.max_slots(SLOT_BYTES[KV]) // 2
    first, second, states = keys(KV, 0, per_slab), keys(KV, 100, per_slab), keys(STATE, 0, 1)
    assert store(manager, first)
    assert store(manager, second)
    assert store(manager, [*first, *states]), "the older slab is offered, so the other goes"
    assert (num_held(manager, first), num_held(manager, states)) == (per_slab, 1)
    assert num_held(manager, second) == 0


def test_invariant_10_a_last_store_that_is_refused_keeps_nobody_busy():
    loop = Loop()
    with no_room(loop):
        loop.serve("first", PROMPT)
        assert skipped(loop, 0)["refused"] >= 12
        assert not loop.connector.has_pending_push_work()
    loop.close()


# -- 12 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [KV, STATE])
def test_invariant_12_a_pool_full_of_one_size_makes_room_for_the_other(first):
    manager, pool = make_manager()
    number = 0
    while pool.try_reserve(SLOT_BYTES[first]):
        number += 1
    for slot in pool.live:
        pool.free(slot)
    assert store(manager, keys(first, 0, number)), "the pool is full of them"
    second = 1 - first
    assert store(manager, keys(second, 0, 3))
    assert num_held(manager, keys(second, 0, 3)) == 3
    assert num_held(manager, keys(first, 0, number)) > 0, "only what had to go is gone"


@pytest.mark.parametrize("old", [KV, STATE])
def test_invariant_12_the_older_of_two_sizes_gives_way(old):
    """Neither size keeps a share of its own: half the pool is cold, and that half goes first."""
    manager, _ = make_manager()
    counts = {KV: 4 * 6, STATE: 4}
    young = 1 - old
    for group in (old, young):
        assert store(manager, keys(group, 0, counts[group]))
    assert store(manager, keys(young, 1000, counts[young]))
    assert num_held(manager, keys(young, 0, counts[young])) == counts[young]
    assert num_held(manager, keys(old, 0, counts[old])) == 0


def test_invariant_12_used_bytes_are_those_of_the_resident_chunks_at_all_times():
    """Stores, loads, failures, refusals, resets: every chunk has one slot, every slot a chunk."""
    draw = random.Random(0)
    manager, pool = make_manager(6)
    every = [*keys(KV, 0, 60), *keys(STATE, 0, 12)]
    under_way = []
    for _ in range(3000):
        dice = draw.random()
        if dice < 0.5:
            wanted = draw.sample(every, draw.randrange(1, 9))
            output = manager.prepare_store(wanted, CTX)
            if output is not None and output.keys_to_store:
                under_way.append((manager.complete_store, list(output.keys_to_store)))
        elif dice < 0.6:
            readable = [key for key in every if manager.lookup(key, CTX) is LookupResult.HIT]
            wanted = draw.sample(readable, min(len(readable), 3))
            manager.prepare_load(wanted, CTX)
            under_way.append((manager.complete_load, wanted))
        elif dice < 0.995 and under_way:
            complete, wanted = under_way.pop(draw.randrange(len(under_way)))
            complete(wanted, CTX, success=draw.random() < 0.9)
        elif dice >= 0.995:
            manager.reset_cache()
        check_bytes(manager, pool, every)
    while under_way:
        complete, wanted = under_way.pop()
        complete(wanted, CTX)
        check_bytes(manager, pool, every)
    manager.reset_cache()
    assert pool.used_bytes == 0


def check_bytes(manager, pool, every):
    stats = manager.get_stats()
    resident = [key for key in every if manager.lookup(key, CTX) is not LookupResult.MISS]
    assert stats.num_chunks == len(resident)
    assert len(pool.live) == stats.num_chunks + stats.num_quarantined
    taken = sum(slot_stride(slot.num_bytes) for slot in pool.live)
    assert pool.used_bytes == stats.used_bytes == taken <= stats.capacity_bytes
    if not stats.num_quarantined:
        assert taken == sum(STRIDES[key[-1]] for key in resident)


# -- the ceiling ------------------------------------------------------------------------------------------


def resident_bytes():
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def make_big_connector(host_bytes):
    attention = FullAttentionSpec(16, 1, 512, np.float32)
    state = MambaSpec(16, ((100, 700),), (np.float32,))
    config = KVCacheConfig((KVCacheGroupSpec(("kv",), attention, 4), KVCacheGroupSpec(("state",), state, 2)))
    return OffloadingConnector(OffloadingConfig(host_bytes=host_bytes), config)


@pytest.mark.parametrize("host_bytes", [(64 << 20) + 4095, (64 << 20) + (1 << 20), 48_000_000])
def test_invariant_12_host_bytes_is_a_ceiling_for_the_memory_the_connector_takes(host_bytes):
    load_native()
    gc.collect()
    before = resident_bytes()
    connector = make_big_connector(host_bytes)
    grown = resident_bytes() - before
    backend = connector.get_stats().backend
    assert backend.capacity_bytes <= host_bytes
    assert host_bytes - 4096 < backend.capacity_bytes, "and no page of it is wasted"
    # What Python itself allocates meanwhile is far less than a huge page.
    assert grown < host_bytes + (1 << 20)
    connector.shutdown()
    assert resident_bytes() - before < 1 << 20, "all of it is given back"


def test_invariant_12_a_pool_too_small_for_one_chunk_is_refused_and_not_exceeded():
    with pytest.raises(ConfigError, match="at least"):
        make_big_connector(16 * 1024)


class BuildableModel(NumpyModel):
    """What ``build_engine`` makes caches for."""

    def cache_groups(self, block_size, dtype):
        assert all(layer.block_size == block_size for layer in self.layers)
        return [((f"layer.{index}",), layer.spec) for index, layer in enumerate(self.layers)]


def test_invariant_12_an_engine_that_serves_under_pressure_stays_within_host_bytes():
    host_bytes, params = 40_000, SamplingParams(max_new_tokens=4)
    model = BuildableModel((Layer("latent", 16), Layer("window", 16, 20), Layer("state", 16)), 128, True)
    engine = build_engine(
        model,
        device_bytes=20_000,
        max_tokens=128,
        offloading=OffloadingConfig(host_bytes=host_bytes, offload_prompt_only=False),
        engine_config=EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3),
    )
    engine._programs = NumpyPrograms(model)
    pool: HostPool = engine.connector._spec.pool
    assert pool.capacity_bytes <= host_bytes
    prompts = {f"r{index}": random_prompt(index, 60 + index) for index in range(8)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, params, name)
    outputs = {}
    while len(outputs) < len(prompts):
        outputs.update((output.request_id, output.output_ids) for output in engine.step())
        stats = engine.connector.get_stats().backend
        assert stats.used_bytes == pool.used_bytes <= pool.capacity_bytes
    engine.flush()
    assert outputs == {name: oracle_output(model.layers, prompt, params) for name, prompt in prompts.items()}
    assert engine.connector.get_stats().evicted_chunks > 0
    engine.shutdown()


def test_invariant_12_chunks_of_states_and_of_tokens_share_the_budget_of_a_loop():
    """States of 4 KiB, blocks of 1 KiB: both kinds stay loadable in a pool that is always full."""
    attention = FullAttentionSpec(BLOCK, 1, 1, np.int64, page_size_bytes=1024)
    state = MambaSpec(STATE_BLOCK, ((512,),), (np.int64,))
    config = KVCacheConfig(
        (KVCacheGroupSpec(("full.0",), attention, 64), KVCacheGroupSpec(("state.0",), state, 16))
    )
    loop = Loop(config=config, pool_bytes=64 * 1024, max_step_tokens=STATE_BLOCK)
    draw = random.Random(1)
    for number in range(40):
        prompt = [draw.randrange(3), *PROMPT[: draw.randrange(10, 49)]]
        loop.add(f"r{number}", prompt, 2)
        while loop.busy:
            loop.step()
            live = loop.pool.live
            assert loop.pool.used_bytes == sum(slot_stride(slot.num_bytes) for slot in live) <= 64 * 1024
            backend = loop.connector.get_stats().backend
            assert len(live) == backend.num_chunks + backend.num_quarantined
        assert loop.outputs[f"r{number}"] == expected_output(prompt, 2)
    stats = loop.connector.get_stats()
    assert all(group.evicted_chunks and group.loaded_chunks for group in stats.groups)
    loop.close()
