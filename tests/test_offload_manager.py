"""The host backend's bookkeeping, against a model that recomputes everything from lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash, GroupId, get_offload_group, make_offload_key
from jaxkv.offload import LookupResult, LRUPolicy, ReqContext
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.offload.policies import find_policy
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


def test_first_key_of_a_prefix_is_evicted_last():
    manager, _ = make_manager()
    store(manager, keys(*range(8)))
    assert store(manager, keys(8)).evicted_keys == (key(7),)
    manager.touch(keys(0, 1, 2, 3, 4, 5, 6), CTX)
    assert store(manager, keys(9)).evicted_keys == (key(8),)
    assert store(manager, keys(10)).evicted_keys == (key(6),)


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
    output = store(manager, keys(7, 6, 8))
    assert output.keys_to_store == (key(8),)
    assert output.evicted_keys == (key(5),)
    assert all(held(manager, keys(6, 7, 8)))


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
    assert store(manager, keys(8)).evicted_keys == (key(7),)


def test_slab_with_a_chunk_in_use_does_not_change_owner():
    manager, _ = make_manager(num_slabs=2)
    store(manager, keys(1, 2, group=1))
    manager.prepare_load(keys(1, group=1), CTX)
    store(manager, keys(*range(8)))
    assert store(manager, keys(8)).evicted_keys == (key(7),)
    manager.complete_load(keys(1, group=1), CTX)


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
    manager.prepare_load(keys(0), CTX)
    manager.prepare_load(keys(0), CTX)
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
    pool.try_reserve = lambda _: None
    assert manager.prepare_store(keys(9), CTX) is None


def test_events_name_what_became_loadable_and_what_was_removed():
    manager, _ = make_manager(enable_events=True)
    store(manager, keys(1, 2))
    manager.reset_cache()
    stored, removed = manager.take_events()
    assert (stored.keys, stored.removed) == (tuple(keys(1, 2)), False)
    assert (set(removed.keys), removed.removed) == (set(keys(1, 2)), True)
    assert not manager.take_events()


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


@pytest.mark.parametrize(
    "name", ["mru", "jaxkv.offload.policies.NoSuchPolicy", "no_such_module.Policy", "builtins.dict"]
)
def test_unknown_policy_is_named_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"{name}.*lru"):
        find_policy(name)


def test_policy_is_found_by_dotted_path():
    assert find_policy("jaxkv.offload.policies.LRUPolicy") is LRUPolicy


ALL_KEYS = [key(number, group) for number in range(25) for group in range(2)]


class ManagerModel(RuleBasedStateMachine):
    """Two slot sizes over four slabs. The model is a list of chunks, coldest first, and two bags of uses."""

    @initialize()
    def start(self):
        self.manager, self.pool = make_manager(num_slabs=4)
        self.cold_to_hot: list = []
        self.writing: list = []
        self.reading: list = []

    some_keys = st.lists(st.sampled_from(ALL_KEYS), min_size=1, max_size=12, unique=True)

    def used(self, wanted):
        """What a use does to the order: the first key becomes the hottest."""
        for one in reversed(wanted):
            if one in self.cold_to_hot:
                self.cold_to_hot.remove(one)
                self.cold_to_hot.append(one)

    def busy(self):
        return {one for job in self.writing + self.reading for one in job}

    @rule(wanted=some_keys)
    def begin_store(self, wanted):
        before = list(self.cold_to_hot)
        output = self.manager.prepare_store(wanted, CTX)
        pending = {one for job in self.writing for one in job}
        if output is None:
            assert self.cold_to_hot == before
            self.used([one for one in wanted if one in before and one not in self.busy()])
            return
        assert output.keys_to_store == tuple(
            one for one in wanted if one not in before and one not in pending
        )
        evicted = set(output.evicted_keys)
        assert evicted <= set(before) - self.busy() - set(wanted)
        self.check_coldest_go_first(before, wanted, output)
        self.cold_to_hot = [one for one in before if one not in evicted]
        self.used([one for one in wanted if one in before and one not in self.busy()])
        self.writing.append(list(output.keys_to_store))

    def check_coldest_go_first(self, before, wanted, output):
        """Of a size that keeps its slabs, those evicted are the coldest that could be."""
        evicted = set(output.evicted_keys)
        groups = {get_offload_group(one) for one in evicted}
        if len(groups) != 1 or groups != {get_offload_group(one) for one in output.keys_to_store}:
            return
        could_go = [
            one
            for one in before
            if one not in self.busy() and one not in wanted and get_offload_group(one) in groups
        ]
        assert set(could_go[: len(evicted)]) == evicted

    @rule(data=st.data(), success=st.booleans())
    def end_store(self, data, success):
        if self.writing:
            job = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
            self.manager.complete_store(job, CTX, success=success)
            if success:
                self.cold_to_hot.extend(reversed(job))

    @rule(data=st.data())
    def begin_load(self, data):
        if self.cold_to_hot:
            job = data.draw(st.lists(st.sampled_from(self.cold_to_hot), min_size=1, max_size=4, unique=True))
            self.manager.prepare_load(job, CTX)
            self.reading.append(job)

    @rule(data=st.data())
    def end_load(self, data):
        if self.reading:
            job = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
            self.manager.complete_load(job, CTX)
            self.used([one for one in job if one not in self.busy()])

    @rule(wanted=some_keys)
    def touch(self, wanted):
        self.manager.touch(wanted, CTX)
        self.used([one for one in wanted if one not in self.busy()])

    @rule()
    def come_to_rest_and_reset(self):
        for job in self.writing:
            self.manager.complete_store(job, CTX)
        for job in self.reading:
            self.manager.complete_load(job, CTX)
        self.manager.reset_cache()
        assert not self.pool.live
        self.cold_to_hot, self.writing, self.reading = [], [], []

    @invariant()
    def holds_what_the_model_holds(self):
        pending = {one for job in self.writing for one in job}
        for one in ALL_KEYS:
            expected = LookupResult.HIT_PENDING if one in pending else LookupResult.MISS
            expected = LookupResult.HIT if one in self.cold_to_hot else expected
            assert self.manager.lookup(one, CTX) is expected
        assert len(self.pool.live) == len(self.cold_to_hot) + sum(map(len, self.writing))
        assert bool(self.manager.leaks()) == bool(self.busy())


TestManagerModel = ManagerModel.TestCase
TestManagerModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
