"""Invariants 1 to 3 of the connector: every group holds what is promised, it stays, a state is no window."""

import random

import pytest
from connector_loop import BLOCK, STATE_BLOCK, WINDOW, Loop, expected_output
from loop_model import make_config
from loop_tools import crowd, forget, held, note_loads

from jaxkv.connector import SchedulerOutput
from jaxkv.keys import GroupId

PROMPT = list(range(100, 150))
STATE = GroupId(2)


def servable(boundary, full, window, state):
    """Whether these ends of chunks are all that the token at ``boundary`` reads of what lies before it."""
    blocks = range(BLOCK, boundary + 1, BLOCK)
    read = {end for end in blocks if end > boundary - (WINDOW - 1)}
    return full >= set(blocks) and window >= read and boundary in state


@pytest.mark.parametrize("seed", range(25))
def test_invariant_01_a_hit_never_exceeds_what_every_group_holds(seed):
    draw = random.Random(seed)
    loop = Loop(max_step_tokens=STATE_BLOCK)
    first = loop.serve("first", PROMPT)
    ends = [held(loop, first, group) for group in range(3)]
    for group in range(3):
        lost = draw.sample(sorted(ends[group]), draw.randrange(min(4, len(ends[group]))))
        ends[group] -= set(lost)
        forget(loop, first, group, lost)
    best = max((end for end in range(STATE_BLOCK, 49, STATE_BLOCK) if servable(end, *ends)), default=0)
    second = loop.serve("second", PROMPT, 3)
    assert second.host_hits == ([best] if best else [])
    assert loop.outputs["second"] == expected_output(PROMPT, 3)
    loop.close()


def test_invariant_01_a_boundary_one_group_lowered_the_hit_to_is_asked_of_all_groups_again():
    """States at 24 and 16 alone; at 24 the window reads a block that is gone, but not at 48, nor at 16."""
    loop = Loop(max_step_tokens=STATE_BLOCK)
    first = loop.serve("first", PROMPT)
    forget(loop, first, 2, [8, 32, 40, 48])
    forget(loop, first, 1, [20])
    assert loop.serve("second", PROMPT).host_hits == [16]
    loop.close()


@pytest.mark.parametrize("group", [0, 1])
def test_invariant_01_a_tail_counts_only_where_every_group_kept_it(group):
    """Links of 2 tokens, blocks of 4: at 46 tokens both groups have a block that is cut."""
    loop = Loop(config=make_config({"full": 1, "window": 1}, tokens_per_hash=2))
    first = loop.serve("first", PROMPT[:47])
    assert loop.serve("whole", PROMPT[:47]).host_hits == [46]
    forget(loop, first, group, [46])
    assert loop.serve("second", PROMPT[:47]).host_hits == [44]
    loop.close()


def full_pool():
    """A pool that the chunks of 24 tokens just fit: six of full attention, six of the window, one state."""
    loop = Loop(pool_bytes=16 * 512, slab_bytes=4 * 512, max_step_tokens=24)
    return loop, loop.serve("first", PROMPT[:25])


def test_invariant_02_what_was_promised_is_there_at_allocation_and_until_the_load_has_ended():
    loop, first = full_pool()
    second = loop.add("second", PROMPT[:26])
    ask = loop.connector.get_num_new_matched_tokens

    def ask_in_a_crowd(request, known):
        answer = ask(request, known)
        crowd(loop, 1)
        return answer

    loop.connector.get_num_new_matched_tokens = ask_in_a_crowd
    loop.worker.delayed = True
    loop.step()
    assert second.host_hits == [24]
    for step in range(4):
        crowd(loop, 10 + step)
        loop.step()
        assert second.request_id in loop.loading
        assert [max(held(loop, first, group)) for group in range(3)] == [24, 24, 24]
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert second.tokens[26:] == expected_output(PROMPT[:26], 1)
    crowd(loop, 30)
    del loop.connector.get_num_new_matched_tokens
    assert loop.serve("third", PROMPT[:26]).host_hits == [], "and then it can go"
    loop.close()


def test_invariant_02_stores_of_the_same_step_do_not_take_what_was_promised():
    """Stores are planned in ``build_connector_meta``, after lookups: a promise outlives them."""
    loop, _ = full_pool()
    loop.add("filler", [7] * 25)
    loop.step()
    second = loop.add("second", PROMPT[:26])
    loop.step()
    assert second.host_hits == [24]
    loop.run()
    assert loop.outputs["second"] == expected_output(PROMPT[:26], 1)
    loop.close()


def test_invariant_02_a_promise_that_nobody_took_starves_no_store():
    loop, _ = full_pool()
    asking = loop.add("asking", PROMPT[:26])
    loop.waiting.remove(asking)
    assert loop.connector.get_num_new_matched_tokens(asking, 0) == (24, True)
    loop.connector.build_connector_meta(SchedulerOutput())
    crowd(loop, 1)
    assert loop.connector.get_num_new_matched_tokens(asking, 0) == (0, False)
    loop.abort(asking)
    loop.run()
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_invariant_03_a_state_hit_takes_one_state_and_none_before_it(blocks_per_chunk):
    size = STATE_BLOCK * blocks_per_chunk
    loop = Loop(max_step_tokens=size, blocks_per_chunk=blocks_per_chunk)
    first = loop.serve("first", PROMPT)
    ends = held(loop, first, STATE, size)
    assert ends == set(range(size, 49, size))
    forget(loop, first, STATE, ends - {48})
    moved = note_loads(loop, STATE)
    second = loop.serve("second", PROMPT, 2)
    assert second.host_hits == [48]
    assert [block >= 0 for block in moved[0]] == [False] * (blocks_per_chunk - 1) + [True]
    assert loop.outputs["second"] == expected_output(PROMPT, 2)
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_invariant_03_a_state_is_stored_only_where_a_step_ended_on_a_chunk(blocks_per_chunk):
    loop = Loop(max_step_tokens=16, blocks_per_chunk=blocks_per_chunk)
    first = loop.serve("first", PROMPT)
    assert held(loop, first, STATE, STATE_BLOCK * blocks_per_chunk) == {16, 32, 48}
    loop.close()


def test_invariant_03_a_tail_is_not_stored_with_a_state_of_another_boundary():
    """Links of 4 tokens: the prompt's last is at 44, where no step ended, so no state stands there."""
    loop = Loop(max_step_tokens=64)
    first = loop.serve("first", PROMPT[:46], 8)
    assert held(loop, first, STATE) == {40}
    assert loop.serve("second", PROMPT[:46], 2).host_hits == [40]
    assert loop.outputs["second"] == expected_output(PROMPT[:46], 2)
    loop.close()


def test_invariant_03_a_state_between_chunks_is_not_taken_for_one_at_a_chunk():
    """Chunks of 16 tokens, steps that end at every 8: the states at 8, 24 and 40 belong to no chunk."""
    loop = Loop(max_step_tokens=STATE_BLOCK, blocks_per_chunk=2)
    first = loop.serve("first", PROMPT)
    assert held(loop, first, STATE, 16) == {16, 32, 48}
    for name, length, hit in (("a", 46, 32), ("b", 30, 16)):
        assert loop.serve(name, PROMPT[:length], 2).host_hits == [hit]
        assert loop.outputs[name] == expected_output(PROMPT[:length], 2)
    loop.close()
