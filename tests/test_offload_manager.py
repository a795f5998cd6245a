"""The host backend's bookkeeping, rule by rule; ``test_manager_model.py`` compares it with a model."""

import pytest

from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash, GroupId, KeyRun, KeyRuns, make_offload_key
from jaxkv.offload import LookupResult, PrefixLookup, ReqContext
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.slots import Slots
from jaxkv.testing.fake_pool import FakePool

CTX = ReqContext("r")
SIZES = (512, 2048)
SLAB = 4096


def key(number: int, group: int = 0):
    return make_offload_key(BlockHash(number.to_bytes(16, "big")), GroupId(group))


def keys(*numbers: int, group: int = 0):
    return [key(number, group) for number in numbers]


def make_manager(num_slabs: int = 1, **options):
    pool = FakePool(num_slabs * SLAB, SLAB)
    return HostOffloadingManager(pool, SIZES, **options), pool


def store(manager, wanted):
    output = manager.prepare_store(wanted, CTX)
    assert output is not None
    manager.complete_store(output.keys_to_store, CTX)
    return output


def finish(manager, ctx=CTX):
    manager.on_request_finished(ctx)


def held(manager, wanted):
    return [manager.lookup(one, CTX) is LookupResult.HIT for one in wanted]


def test_chunk_is_pending_until_its_store_completes():
    manager, _ = make_manager()
    output = manager.prepare_store(keys(1), CTX)
    assert manager.lookup(key(1), CTX) is LookupResult.HIT_PENDING
    manager.complete_store(output.keys_to_store, CTX)
    assert manager.lookup(key(1), CTX) is LookupResult.HIT


def test_keys_already_held_are_not_stored_again():
    manager, _ = make_manager()
    store(manager, keys(1, 2))
    assert store(manager, keys(1, 3, 2)).keys_to_store == (key(3),)


def test_failed_store_leaves_nothing():
    manager, pool = make_manager()
    output = manager.prepare_store(keys(1, 2), CTX)
    manager.complete_store(output.keys_to_store, CTX, success=False)
    assert manager.lookup(key(1), CTX) is LookupResult.MISS
    assert not pool.live


def test_least_recently_used_chunk_is_evicted_first():
    manager, _ = make_manager()
    for number in range(8):
        store(manager, keys(number))
    manager.touch(keys(0), CTX)
    assert store(manager, keys(8, 9)).evicted_keys == tuple(keys(1, 2))


def test_chunks_are_ranked_by_insertion_until_their_request_ends():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    assert store(manager, keys(8)).evicted_keys == (key(0),)


def test_first_key_of_a_request_that_ended_is_evicted_last():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    finish(manager)
    assert store(manager, keys(8)).evicted_keys == (key(7),)
    manager.touch(keys(0, 1, 2, 3, 4, 5, 6), CTX)
    assert store(manager, keys(9)).evicted_keys == (key(8),)
    assert store(manager, keys(10)).evicted_keys == (key(6),)


def test_loaded_chunks_are_as_warm_as_the_end_of_their_request():
    manager, _ = make_manager()
    for number in range(8):
        store(manager, keys(number))
    finish(manager)
    reader = ReqContext("reader")
    manager.prepare_load(keys(6, 7), reader)
    manager.complete_load(keys(6, 7), reader)
    assert store(manager, keys(8)).evicted_keys == (key(7),), "a load alone changes no rank"
    manager.prepare_load(keys(6, 5), reader)
    manager.complete_load(keys(6, 5), reader)
    finish(manager, reader)
    assert store(manager, keys(9, 10, 11, 12, 13)).evicted_keys == tuple(keys(4, 3, 2, 1, 0))


def test_positions_order_a_request_whatever_was_stored_first():
    manager, _ = make_manager()
    hashes = [BlockHash(number.to_bytes(16, "big")) for number in range(8)]
    store(manager, KeyRun(hashes, GroupId(0), 4, 1, 4))
    store(manager, KeyRun(hashes, GroupId(0), 0, 1, 4))
    finish(manager)
    assert store(manager, keys(8, 9, 10)).evicted_keys == tuple(keys(7, 6, 5))


def test_groups_of_a_request_are_ordered_by_position_and_not_one_after_another():
    pool = FakePool(SLAB, SLAB)
    manager = HostOffloadingManager(pool, (512, 512))
    hashes = [BlockHash(number.to_bytes(16, "big")) for number in range(4)]
    store(manager, KeyRuns([KeyRun(hashes, GroupId(group), 0, 1, 4) for group in range(2)]))
    finish(manager)
    evicted = store(manager, keys(20, 21, 22)).evicted_keys
    assert evicted == (key(3, group=1), key(3, group=0), key(2, group=1))


def test_full_pool_is_a_miss_and_loses_nothing():
    manager, pool = make_manager()
    store(manager, keys(*range(8)))
    manager.prepare_load(keys(0, 1, 2), CTX)
    assert manager.prepare_store(keys(*range(10, 16)), CTX) is None
    assert all(held(manager, keys(*range(8))))
    assert len(pool.live) == 8
    manager.complete_load(keys(0, 1, 2), CTX)
    assert len(store(manager, keys(*range(10, 16))).evicted_keys) == 6


def test_chunk_in_flight_is_not_evicted():
    manager, _ = make_manager()
    loading = keys(*range(4))
    store(manager, loading)
    manager.prepare_load(loading, CTX)
    writing = manager.prepare_store(keys(*range(4, 8)), CTX)
    assert manager.prepare_store(keys(8), CTX) is None
    manager.complete_store(writing.keys_to_store, CTX)
    assert get_evicted(manager, keys(8)) <= set(writing.keys_to_store)
    manager.complete_load(loading, CTX)


def get_evicted(manager, wanted):
    return set(store(manager, wanted).evicted_keys)


def test_keys_being_stored_are_not_evicted_to_make_room_for_themselves():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    output = store(manager, keys(0, 1, 8))
    assert output.keys_to_store == (key(8),)
    assert output.evicted_keys == (key(2),)
    assert all(held(manager, keys(0, 1, 8)))


def test_cold_slab_of_another_size_changes_owner():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(1, 2, group=1))
    store(manager, keys(*range(8)))
    assert set(store(manager, keys(8)).evicted_keys) == set(keys(1, 2, group=1))
    assert not store(manager, keys(*range(9, 16))).evicted_keys


def test_warm_slab_of_another_size_stays_while_a_colder_chunk_can_go():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(*range(8)))
    store(manager, keys(1, 2, group=1))
    assert store(manager, keys(8)).evicted_keys == (key(0),)


def test_slab_with_a_chunk_in_use_does_not_change_owner():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(1, 2, group=1))
    manager.prepare_load(keys(1, group=1), CTX)
    store(manager, keys(*range(8)))
    assert store(manager, keys(8)).evicted_keys == (key(0),)
    manager.complete_load(keys(1, group=1), CTX)


def test_slab_is_as_warm_as_its_warmest_chunk():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(1, 2, group=1))
    store(manager, keys(*range(8)))
    manager.touch(keys(2, group=1), CTX)
    assert store(manager, keys(8)).evicted_keys == (key(0),)


def test_slab_with_an_offered_chunk_does_not_change_owner():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(1, 2, group=1))
    store(manager, keys(*range(8)))
    output = store(manager, [*keys(8), *keys(1, group=1)])
    assert output.evicted_keys == (key(0),)


def test_size_without_chunks_gets_a_slab_however_warm_the_others_are():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(*range(16)))
    assert len(store(manager, keys(1, group=1)).evicted_keys) == 8
    assert not store(manager, keys(2, group=1)).evicted_keys


def test_one_store_may_empty_slabs_for_two_sizes():
    manager, pool = make_manager(num_slabs=2)
    store(manager, keys(*range(16)))
    output = store(manager, keys(*range(20, 24)) + keys(1, 2, group=1))
    assert len(output.evicted_keys) == 12
    assert pool.used_bytes == 2 * 2048 + 8 * 512


def test_every_load_keeps_its_chunk_until_it_completes():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    manager.prepare_load(keys(0, 0), CTX)
    manager.complete_load(keys(0), CTX)
    assert key(0) not in get_evicted(manager, keys(*range(10, 17)))
    manager.complete_load(keys(0), CTX)
    assert manager.leaks() == []


def test_chunk_that_could_not_be_read_is_forgotten_when_its_last_reader_ends():
    manager, pool = make_manager()
    store(manager, keys(1))
    manager.prepare_load(keys(1), CTX)
    manager.prepare_load(keys(1), CTX)
    manager.complete_load(keys(1), CTX, success=False)
    assert manager.lookup(key(1), CTX) is LookupResult.MISS
    assert len(pool.live) == 1
    manager.complete_load(keys(1), CTX)
    assert not pool.live


def test_completion_from_before_a_reset_frees_its_slot_and_makes_nothing_loadable():
    manager, pool = make_manager()
    output = manager.prepare_store(keys(1), CTX)
    manager.reset_cache()
    assert len(pool.live) == 1
    assert manager.prepare_store(keys(1), CTX) is None, "a late completion would be taken for this one's"
    manager.complete_store(output.keys_to_store, CTX)
    assert manager.lookup(key(1), CTX) is LookupResult.MISS
    assert not pool.live
    store(manager, keys(1))
    assert held(manager, keys(1)) == [True]


def test_chunks_being_loaded_outlive_a_reset():
    manager, pool = make_manager()
    store(manager, keys(1, 2))
    manager.prepare_load(keys(1), CTX)
    manager.reset_cache()
    assert held(manager, keys(1, 2)) == [False, False]
    assert len(pool.live) == 1
    assert manager.leaks()
    manager.complete_load(keys(1), CTX)
    assert not pool.live
    assert not manager.leaks()


def test_slot_that_somebody_views_makes_a_store_a_miss():
    manager, pool = make_manager()
    store(manager, keys(*range(8)))
    columns = pool.slot_pool.list_live()[:2]
    assert pool.slot_pool.pin(*columns)
    assert manager.prepare_store(keys(9), CTX) is None
    assert (manager.lookup(key(9), CTX), manager.leaks()) == (LookupResult.MISS, [])
    pool.slot_pool.unpin(*columns)
    assert manager.prepare_store(keys(9), CTX) is not None


def test_events_name_what_became_loadable_and_what_was_removed():
    manager, _ = make_manager(enable_events=True)
    store(manager, keys(1, 2))
    manager.reset_cache()
    stored, removed = manager.take_events()
    assert (stored.keys, stored.removed) == (tuple(keys(1, 2)), False)
    assert (set(removed.keys), removed.removed) == (set(keys(1, 2)), True)
    assert not manager.take_events()


def test_chunk_evicted_in_vain_is_reported_as_removed():
    manager, pool = make_manager(enable_events=True)
    store(manager, keys(*range(8)))
    columns = pool.slot_pool.list_live()[:2]
    pool.slot_pool.pin(*columns)
    assert manager.prepare_store(keys(9), CTX) is None
    pool.slot_pool.unpin(*columns)
    assert manager.take_events()[-1].keys == (key(0),)


def test_chunks_that_could_not_be_read_are_reported_as_removed():
    manager, _ = make_manager(enable_events=True)
    store(manager, keys(1, 2))
    manager.take_events()
    manager.prepare_load(keys(1, 2), CTX)
    manager.complete_load(keys(1, 2), CTX, success=False)
    (removed,) = manager.take_events()
    assert (removed.keys, removed.removed) == (tuple(keys(1, 2)), True)


def test_events_are_not_collected_unless_asked_for():
    manager, _ = make_manager()
    store(manager, keys(1))
    assert not manager.take_events()


def test_shutdown_frees_every_slot():
    manager, pool = make_manager()
    store(manager, keys(1, 2))
    manager.prepare_store(keys(3), CTX)
    manager.shutdown()
    assert not pool.live


def test_pool_too_small_for_one_chunk_is_named():
    with pytest.raises(ConfigError, match="cannot hold one slot"):
        HostOffloadingManager(FakePool(1024), SIZES)


def test_job_finds_the_slots_of_each_group():
    manager, pool = make_manager(num_slabs=2)
    output = manager.prepare_store([*keys(1, 2), *keys(1, group=1)], CTX)
    small = output.store_spec.of_group(GroupId(0), 0, 2)
    large = output.store_spec.of_group(GroupId(1), 2, 3)
    assert isinstance(small, Slots)
    assert {*small, *large} == pool.live
    assert ([slot.num_bytes for slot in small], [slot.num_bytes for slot in large]) == ([512, 512], [2048])
    manager.complete_store(output.keys_to_store, CTX)
    loaded = manager.prepare_load([*keys(1, group=1), *keys(2)], CTX)
    assert (loaded.of_group(GroupId(1), 0, 1), loaded.of_group(GroupId(0), 1, 2)) == (large, small[1:])


def test_runs_of_keys_are_the_keys_they_name():
    manager, _ = make_manager(num_slabs=2)
    hashes = [BlockHash(number.to_bytes(16, "big")) for number in range(20)]
    runs = KeyRuns([KeyRun(hashes, GroupId(0), 1, 2, 3), KeyRun(hashes, GroupId(1), 5, 5, 2)])
    output = manager.prepare_store(runs, CTX)
    assert output.keys_to_store is runs
    manager.complete_store(runs, CTX)
    assert all(held(manager, [*keys(1, 3, 5), *keys(5, 10, group=1)]))
    assert manager.prepare_store(runs, CTX).keys_to_store == ()
    assert manager.prepare_store(runs.runs[0][1:], CTX).keys_to_store == ()


def test_lookup_counts_from_either_end_up_to_the_first_miss():
    manager, _ = make_manager(num_slabs=64)
    hashes = [BlockHash(number.to_bytes(16, "big")) for number in range(300)]
    run = KeyRun(hashes, GroupId(0), 0, 1, 300)
    store(manager, run[:150])
    store(manager, run[151:])
    assert manager.lookup_prefix(run, CTX) == PrefixLookup(150)
    assert manager.lookup_suffix(run, CTX) == PrefixLookup(149)
    assert manager.lookup_prefix(run[151:], CTX) == PrefixLookup(149)
    assert manager.lookup_suffix(run[:150], CTX) == PrefixLookup(150)
    assert manager.lookup_prefix(run[150:], CTX) == PrefixLookup(0)
    assert manager.lookup_prefix([], CTX) == PrefixLookup(0)
    manager.prepare_store(run[150:151], CTX)
    assert manager.lookup_prefix(run, CTX) == PrefixLookup(300, LookupResult.HIT_PENDING)
    assert manager.lookup_suffix(list(run[151:]), CTX) == PrefixLookup(149)


@pytest.mark.parametrize("hash_bytes", [16, 32])
def test_keys_differ_in_every_byte(hash_bytes):
    manager, _ = make_manager(num_slabs=64)
    base = bytes(hash_bytes)
    flipped = [base[:at] + b"\x01" + base[at + 1 :] for at in range(hash_bytes)]
    wanted = [make_offload_key(BlockHash(each), GroupId(0)) for each in (base, *flipped)]
    assert len(store(manager, wanted).keys_to_store) == hash_bytes + 1
    assert make_offload_key(BlockHash(base + b"\0"), GroupId(0)) not in wanted
    assert manager.lookup(make_offload_key(BlockHash(base[1:]), GroupId(0)), CTX) is LookupResult.MISS


def test_stats_count_what_is_held_and_what_was_evicted():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    store(manager, keys(8, 9))
    manager.prepare_load(keys(8, 9), CTX)
    manager.complete_load(keys(9), CTX, success=False)
    manager.prepare_load(keys(7), CTX)
    manager.reset_cache()
    stats = manager.get_stats()
    assert (stats.num_chunks, stats.num_busy, stats.num_quarantined, stats.num_evicted) == (0, 2, 2, 2)
    assert (stats.used_bytes, stats.capacity_bytes) == (1024, SLAB)
    manager.complete_load(keys(7, 8), CTX)
    assert manager.get_stats().num_busy == 0
