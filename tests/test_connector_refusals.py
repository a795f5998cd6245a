"""Stores for which there is no room: what of them is taken, and when the rest is offered again."""

from connector_loop import BLOCK, STATE_BLOCK, Loop, expected_output
from loop_model import make_config
from loop_tools import held, key_of, no_room, preempt_in_step, skipped

from jaxkv.offload import StepStoreOutput
from jaxkv.testing.leaks import assert_no_leaks

PROMPT = list(range(100, 150))
HIT = 48


def test_pool_too_small_for_a_step_stores_its_beginning():
    loop = Loop(pool_bytes=16 * 512, slab_bytes=8 * 512, max_step_tokens=64)
    first = loop.serve("first", PROMPT, 2)
    stats = loop.connector.get_stats()
    assert stats.groups[0].stored_chunks
    assert skipped(loop, 0)["refused"]
    assert stats.backend.used_bytes <= stats.backend.capacity_bytes
    assert first.host_hits == []
    assert loop.outputs["first"] == expected_output(PROMPT, 2)
    loop.close()


def test_refused_chunks_are_offered_again_while_the_request_holds_their_blocks():
    loop = Loop(offload_prompt_only=False, max_step_tokens=STATE_BLOCK)
    manager, real = loop.spec.get_manager(), loop.spec.get_manager().prepare_store
    refusals = iter([None] * 12)
    manager.prepare_stores = lambda offers: None
    manager.prepare_store = lambda keys, ctx: next(refusals) if next_left(refusals) else real(keys, ctx)
    loop.serve("first", PROMPT, 8)
    assert loop.connector.get_stats().groups[0].stored_chunks == 14
    assert loop.connector.get_stats().groups[1].stored_chunks < 14
    assert skipped(loop, 1)["released"]
    del manager.prepare_store, manager.prepare_stores
    assert loop.serve("second", PROMPT, 3).host_hits == [HIT]
    loop.close()


def next_left(iterator) -> int:
    return iterator.__length_hint__()


def test_what_was_refused_is_offered_again_when_a_job_has_ended_and_not_in_every_step():
    loop = Loop(offload_prompt_only=False)
    manager, offered = loop.spec.get_manager(), []
    loop.worker.delayed = True
    loop.add("first", PROMPT, 12)
    while not loop.worker.job_ids:
        loop.step()
    manager.prepare_stores = lambda offers: None
    manager.prepare_store = lambda keys, ctx: offered.append(len(keys))
    loop.step()
    assert offered, "and all of it was refused, while a job is under way"
    counts = [len(offered)]
    for _ in range(2 * BLOCK):
        loop.step()
        counts.append(len(offered))
    assert len(set(counts)) <= BLOCK, "only when another chunk is complete"
    del manager.prepare_store, manager.prepare_stores
    loop.worker.finish(loop.worker.job_ids[:1])
    loop.step()
    loop.step()
    assert len(loop.worker.job_ids) == 1, "one job holds what was refused"
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert loop.connector.get_stats().groups[0].stored_chunks == (len(PROMPT) + 12) // BLOCK
    assert_no_leaks(loop.connector)


def take_at_most(loop, num_keys):
    """Make the backend refuse longer offers; the list of what it takes."""
    manager, taken = loop.spec.get_manager(), []
    real = type(manager).prepare_store

    def prepare_store(keys, ctx):
        if len(keys) > num_keys:
            return None
        taken.extend(keys)
        return real(manager, keys, ctx)

    manager.prepare_stores = lambda offers: None
    manager.prepare_store = prepare_store
    return taken


def test_what_was_taken_of_a_refused_plan_is_not_offered_again_and_the_rest_is():
    """A backend that takes four chunks at a time of the twenty and more that a step of 32 tokens offers."""
    loop = Loop(offload_prompt_only=False, max_step_tokens=32)
    taken = take_at_most(loop, 4)
    loop.serve("first", PROMPT, 30)
    assert len(taken) == len(set(taken))
    assert loop.connector.get_stats().groups[0].stored_chunks == (len(PROMPT) + 29) // BLOCK
    assert skipped(loop, 0).keys() == {"refused"}
    loop.close()


def test_tail_that_was_taken_of_a_refused_plan_is_not_offered_again():
    """At 40 tokens there is room for five chunks: those that end up to 16, and the prompt's tail at 14."""
    loop = Loop(config=make_config({"full": 1}, tokens_per_hash=2), offload_prompt_only=False)
    first = loop.add("first", PROMPT[:15], 40)
    with no_room(loop):
        while first.num_computed_tokens < 40:
            loop.step()
    taken, before = take_at_most(loop, 5), skipped(loop, 0)["refused"]
    loop.step()
    assert taken == [key_of(loop, first, 0, end) for end in (4, 8, 12, 16, 14)]
    assert skipped(loop, 0)["refused"] == before + 6
    loop.run()
    assert len(taken) == len(set(taken))
    loop.close()


def test_each_request_of_a_step_stores_what_there_is_room_for_where_all_were_refused_together():
    def refuse(offers):
        assert offers, "a backend is asked where there is something to store"
        return StepStoreOutput([None] * len(offers), None, ())

    loop = Loop(max_step_tokens=32)
    loop.spec.get_manager().prepare_stores = refuse
    requests = [loop.add(str(index), [index, *PROMPT]) for index in range(3)]
    loop.run()
    for request in requests:
        assert 16 in held(loop, request, 0), "half of a step of 32 tokens"
    loop.close()


def test_what_was_refused_of_a_request_that_is_over_is_given_up():
    loop = Loop(max_step_tokens=64)
    first = loop.add("first", PROMPT)
    with no_room(loop):
        loop.run()
    for _ in range(2):
        loop.step()
    assert held(loop, first, 0) == set()
    loop.close()


def test_what_was_refused_of_a_request_that_was_preempted_is_given_up():
    """Its blocks are others' by the time there is room."""
    loop = Loop(max_step_tokens=64)
    first = loop.add("first", PROMPT, 4)
    with no_room(loop):
        loop.step()
        loop.step()
        preempt_in_step(loop, first)
    loop.waiting.remove(first)
    loop.serve("other", PROMPT[::-1])
    assert held(loop, first, 0) == set()
    loop.waiting.append(first)
    loop.run()
    assert loop.serve("second", PROMPT, 3).host_hits == [HIT]
    assert loop.outputs["second"] == expected_output(PROMPT, 3)
    loop.close()
