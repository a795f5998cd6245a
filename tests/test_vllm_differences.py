"""Where the host backend means to decide otherwise than vLLM. Sections are the rows of docs/eviction.md."""

from itertools import count

import pytest
from connector_loop import Loop
from eviction_rules import RuleManager
from policy_player import Player
from policy_traffic import Setup, Traffic

from jaxkv.keys import BlockHash, GroupId, make_offload_key
from jaxkv.offload import LookupResult, ReqContext
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.testing.fake_pool import FakePool

SMALL, LARGE = GroupId(0), GroupId(1)
SLOT_BYTES = (512, 2048)
SLAB = 4096
CTX = ReqContext("r")
PROMPT = list(range(100, 150))


def key(number, group=SMALL):
    return make_offload_key(BlockHash(number.to_bytes(16, "big")), group)


def keys(*numbers, group=SMALL):
    return [key(number, group) for number in numbers]


def make_manager(num_slabs, policy="lru"):
    return HostOffloadingManager(FakePool(num_slabs * SLAB, SLAB), SLOT_BYTES, policy)


def store(manager, wanted, ctx=CTX):
    output = manager.prepare_store(wanted, ctx)
    if output is not None:
        manager.complete_store(output.keys_to_store, ctx)
    return output


def evicted_by(manager, wanted):
    return list(store(manager, wanted).evicted_keys)


def flood(manager):
    """Store new chunks one by one, until all that may be evicted was."""
    numbers = count(10_000)
    while (output := manager.prepare_store([key(next(numbers))], CTX)) is not None:
        assert output.keys_to_store


# -- pins at lookup ---------------------------------------------------------------------------------------


def test_pins_at_lookup_keep_what_the_connector_promised():
    loop = Loop(pool_bytes=64 * 512, slab_bytes=64 * 512)
    loop.serve("first", PROMPT)
    asking = loop.add("asking", PROMPT)
    loop.waiting.remove(asking)
    promised = loop.connector.get_num_new_matched_tokens(asking, 0)
    assert promised == (48, True)
    flood(loop.spec.get_manager())
    assert loop.connector.get_num_new_matched_tokens(asking, 0) == promised


def test_pins_at_lookup_are_the_connectors_and_a_lookup_alone_keeps_nothing():
    manager = make_manager(1)
    store(manager, keys(1, 2))
    assert manager.lookup_prefix(keys(1, 2), CTX).num_found == 2
    flood(manager)
    assert manager.lookup_prefix(keys(1, 2), CTX).num_found == 0


def hit_of(loop, name, prompt):
    """What a new request is told; it ends without taking the hit."""
    request = loop.add(name, prompt)
    loop.waiting.remove(request)
    num_tokens, _ = loop.connector.get_num_new_matched_tokens(request, 0)
    loop.abort(request)
    loop.run()
    return num_tokens


@pytest.mark.parametrize("asked", [False, True])
def test_pins_at_lookup_are_a_use_even_if_the_hit_is_not_taken(asked):
    loop = Loop(pool_bytes=64 * 512, slab_bytes=64 * 512)
    older, newer = PROMPT, [7] * 50
    loop.serve("older", older)
    num_older = loop.spec.get_manager().get_stats().num_chunks
    loop.serve("newer", newer)
    if asked:
        assert hit_of(loop, "asking", older) == 48
    manager = loop.spec.get_manager()
    num_free = 64 - manager.get_stats().num_chunks
    for number in range(num_free + num_older // 2 + 4):
        store(manager, [key(10_000 + number)])
    assert (hit_of(loop, "probe", older) == 48) is asked
    assert (hit_of(loop, "other probe", newer) == 48) is not asked


# -- byte budget ------------------------------------------------------------------------------------------


def test_byte_budget_holds_as_many_chunks_as_their_sizes_allow():
    manager = make_manager(1)
    assert not evicted_by(manager, keys(*range(8)))
    assert len(evicted_by(manager, keys(8))) == 1
    manager = make_manager(1)
    assert not evicted_by(manager, keys(1, 2, group=LARGE))
    assert len(evicted_by(manager, keys(3, group=LARGE))) == 1


# -- one order for each slot size -------------------------------------------------------------------------


def test_order_of_a_slot_size_gives_up_its_own_chunk_though_one_of_another_size_is_older():
    manager = make_manager(2)
    store(manager, keys(*range(8)))
    store(manager, keys(1, 2, group=LARGE))
    manager.prepare_load(keys(7), CTX)
    assert evicted_by(manager, keys(3, group=LARGE)) == keys(1, group=LARGE)


ONE_GROUP = [setup.seed for setup in map(Setup.of_seed, range(50)) if len(setup.steps) == 1]


@pytest.mark.parametrize("seed", ONE_GROUP)
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_order_of_a_slot_size_is_that_of_a_pool_of_its_own(policy, seed):
    setup = Setup.of_seed(seed)
    pool = FakePool(setup.capacity * 2048, setup.capacity * 2048)
    manager = HostOffloadingManager(
        pool, (2048, 512), policy, store_threshold=setup.threshold, max_tracked_keys=setup.tracker
    )
    host = Player(manager, setup)
    rules = Player(RuleManager(policy, setup.capacity, setup.threshold, setup.tracker), setup)

    def play(call):
        answer = rules.play(call)
        assert host.play(call) == answer, call
        return answer

    Traffic(setup, play).run()


# -- slabs that change owner ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_slab_changes_owner_where_its_last_use_is_older_than_the_chunk_that_would_go(policy):
    manager = make_manager(2, policy)
    store(manager, keys(1, 2, group=LARGE))
    store(manager, keys(*range(8)))
    assert evicted_by(manager, keys(8)) == keys(1, 2, group=LARGE)
    assert not evicted_by(manager, keys(*range(9, 16)))


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_slab_stays_where_it_was_used_since_the_chunk_that_goes(policy):
    manager = make_manager(2, policy)
    store(manager, keys(1, group=LARGE))
    store(manager, keys(*range(8)))
    store(manager, keys(2, group=LARGE))
    assert evicted_by(manager, keys(8)) == keys(0)


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_slab_in_use_does_not_change_owner(policy):
    manager = make_manager(2, policy)
    store(manager, keys(1, 2, group=LARGE))
    store(manager, keys(*range(8)))
    manager.prepare_load(keys(2, group=LARGE), CTX)
    assert evicted_by(manager, keys(8)) == keys(0)


# -- failed loads -----------------------------------------------------------------------------------------


def test_failed_load_forgets_its_chunks():
    manager = make_manager(1)
    store(manager, keys(1, 2))
    manager.prepare_load(keys(1), CTX)
    manager.complete_load(keys(1), CTX, success=False)
    assert [manager.lookup(one, CTX) for one in keys(1, 2)] == [LookupResult.MISS, LookupResult.HIT]


# -- reset with jobs under way ----------------------------------------------------------------------------


def test_reset_leaves_slots_to_the_jobs_under_way_and_refuses_their_keys_until_they_end():
    manager = make_manager(1)
    store(manager, keys(1))
    manager.prepare_load(keys(1), CTX)
    assert manager.prepare_store(keys(2), CTX) is not None
    manager.reset_cache()
    assert manager.get_stats().used_bytes == 2 * 512
    for one in keys(1, 2):
        assert manager.lookup(one, CTX) is LookupResult.MISS
        assert manager.prepare_store([one], CTX) is None
    manager.complete_load(keys(1), CTX)
    manager.complete_store(keys(2), CTX)
    assert manager.get_stats().used_bytes == 0
    assert store(manager, keys(1, 2)).keys_to_store == tuple(keys(1, 2))


# -- shrinking offers -------------------------------------------------------------------------------------


def test_shrinking_offers_of_a_step_store_its_beginning_at_once():
    loop = Loop(pool_bytes=16 * 512, slab_bytes=16 * 512, max_step_tokens=64)
    manager, offers = loop.spec.get_manager(), []
    prepare_store, prepare_stores = manager.prepare_store, manager.prepare_stores

    def store_alone(offered, ctx):
        output = prepare_store(offered, ctx)
        offers.append((len(offered), output is not None))
        return output

    def store_together(asked):
        output = prepare_stores(asked)
        answers = zip(asked, output.keys_to_store, strict=True)
        offers.extend((len(offered), keys is not None) for (offered, _), keys in answers)
        return output

    manager.prepare_store, manager.prepare_stores = store_alone, store_together
    loop.add("first", PROMPT, 3)
    while not offers:
        loop.step()
    assert [taken for _, taken in offers] == [False, True]
    assert [size for size, _ in offers] == [25, 12]
    del manager.prepare_store, manager.prepare_stores
    loop.run()
    loop.close()


# -- wrong calls ------------------------------------------------------------------------------------------


def test_wrong_calls_are_named_and_change_nothing():
    manager = make_manager(1)
    store(manager, keys(1))
    for wrong in (manager.prepare_load, manager.complete_load, manager.complete_store):
        with pytest.raises(ValueError, match=r"[0-9a-f]{40}"):
            wrong(keys(1, 2), CTX)
    assert not manager.leaks()
    assert manager.lookup(key(1), CTX) is LookupResult.HIT
