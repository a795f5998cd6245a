"""Stays on the device that do not go the straight way: left out of steps, admitted twice, told about late."""

import pytest
from connector_loop import Loop, expected_output, value_of
from loop_model import make_config

from jaxkv.connector import SchedulerOutput
from jaxkv.errors import RequestError

PROMPT = list(range(100, 150))


def step_without_report(loop):
    """A step that runs and ends no job, of which the loop does not tell the connector."""
    loop.preempted, loop.new_blocks = set(), {}
    output = SchedulerOutput(loop.schedule(), loop.new_blocks)
    loop.worker.delayed = True
    loop.work(loop.connector.build_connector_meta(output), output)
    loop.worker.delayed = False
    loop.worker.finish()


def test_blocks_given_back_before_a_step_without_the_request_are_not_read_when_it_ends():
    """At 21 tokens block 2 leaves the window, though a hit of 20 tokens, where the request ends, reads it."""
    loop = Loop(
        config=make_config({"full": 1, "window": 1}),
        retention_interval=0,
        offload_prompt_only=False,
        max_step_tokens=20,
    )
    loop.cuts_at_boundaries = True
    first = loop.add("first", PROMPT)
    loop.step()
    loop.max_step_tokens = 1
    loop.step()
    assert first.num_computed_tokens == 21
    loop.running.remove(first)
    loop.skip_window(first)
    loop.serve("other", [7] * 20)
    loop.abort(first)
    loop.run()
    again = [*PROMPT[:20], 1, 2, 3]
    loop.serve("second", again, 2)
    assert loop.outputs["second"] == expected_output(again, 2)
    loop.close()


@pytest.mark.parametrize("kinds", [("full", "window"), ("full", "state")])
def test_step_that_was_not_reported_costs_chunks_and_no_bytes(kinds):
    """Steps end at 12, 44 and 48: who misses the second takes the third for one that ends at 16."""
    loop = Loop(config=make_config(dict.fromkeys(kinds, 1)), max_step_tokens=12)
    loop.cuts_at_boundaries = True
    first = loop.add("first", PROMPT)
    loop.step()
    loop.max_step_tokens = 32
    step_without_report(loop)
    assert first.num_computed_tokens == 44
    loop.max_step_tokens = 4
    for index in range(9):
        loop.add(f"other {index}", [index] * 10)
    loop.run()
    for end in range(5, len(PROMPT), 4):
        loop.serve(f"up to {end}", [*PROMPT[:end], 1], 2)
    loop.close()


def test_request_admitted_anew_before_its_loaded_tokens_were_used_stores_from_its_first_chunk_on():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    loop.step()
    assert loop.loaded == {"second"}
    loop.preempt(second)
    loop.connector.reset_cache()
    loop.preempted = {"second"}
    loop.new_blocks = {}
    scheduled = {}
    loop.admit(second, scheduled)
    output = SchedulerOutput(scheduled, loop.new_blocks, frozenset(), {"second"})
    result = loop.work(loop.connector.build_connector_meta(output), output)
    loop.connector.update_connector_output(result)
    loop.run()
    assert loop.serve("third", PROMPT).host_hits == [48]
    loop.close()


@pytest.mark.parametrize("kinds", [("full", "window"), ("window", "full"), ("state", "full")])
def test_branch_point_is_kept_whatever_the_order_of_groups(kinds):
    loop = Loop(config=make_config(dict.fromkeys(kinds, 1)), retention_interval=0)
    loop.cuts_at_boundaries = True
    for index in range(2):
        loop.serve(f"branch {index}", [*PROMPT[:32], *[index] * 17])
    third = loop.serve("branch 2", [*PROMPT[:32], *[2] * 17])
    assert third.host_hits == [32]
    loop.close()


MODELS = [("full", "window"), ("full", "state"), ("local", "state"), ("window",), ("full", "sink", "state")]


@pytest.mark.parametrize("kinds", MODELS)
@pytest.mark.parametrize("has_drafter", [False, True])
@pytest.mark.parametrize(("blocks_per_chunk", "tokens_per_hash"), [(1, 4), (1, 1), (3, 2)])
def test_equal_prompt_is_served_to_its_last_link_with_the_fewest_boundaries_kept(
    kinds, has_drafter, blocks_per_chunk, tokens_per_hash
):
    """What a drafter leaves is named by the link behind it: its model's last hit ends a link earlier."""
    drafter = kinds[0] if has_drafter else ""
    config = make_config(dict.fromkeys(kinds, 1), drafter=drafter, tokens_per_hash=tokens_per_hash)
    loop = Loop(config=config, blocks_per_chunk=blocks_per_chunk, retention_interval=0)
    loop.cuts_at_boundaries = True
    for length in (1, 2, 9, *range(21, 34)):
        prompt = [length, *PROMPT[: length - 1]]
        loop.serve(f"{length}", prompt)
        links = range(tokens_per_hash, length + 1, tokens_per_hash)
        servable = [end for end in links if end < length and (not has_drafter or end < links[-1])]
        assert loop.serve(f"{length} again", prompt).host_hits == servable[-1:]
    loop.close()


def test_state_handed_over_early_in_a_prompt_does_not_take_the_place_of_its_tail():
    loop = Loop(config=make_config({"full": 1, "state": 1}), max_step_tokens=16)
    loop.cuts_at_boundaries = True
    first = loop.add("first", PROMPT[:30])
    loop.step()
    block = loop.free[1].pop()
    loop.caches["state.0"][block] = [value_of(tuple(PROMPT[:12])), 12]
    loop.handed = {"first": [(1, block, 12)]}
    loop.step()
    loop.free[1].append(block)
    loop.run()
    assert first.done
    assert loop.serve("second", PROMPT[:30]).host_hits == [28]
    loop.close()


def test_state_handed_over_for_a_group_without_states_is_refused():
    loop = Loop(config=make_config({"full": 1, "state": 1}))
    first = loop.add("first", PROMPT)
    loop.step()
    for group in (0, 2, -1):
        with pytest.raises(RequestError, match=f"group {group}"):
            loop.connector.register_finished_partial_tail(first, first.tables, [(group, 0, 12)])
    loop.run()
    loop.close()


def test_what_the_next_stay_finds_computed_is_not_counted_for_the_one_before():
    """Preempted before its step was reported, with one token in block 61, and back with 12 tokens at once."""
    loop = Loop(config=make_config({"full": 1}), max_step_tokens=8)
    request = loop.add("a", PROMPT)
    loop.step()
    loop.max_step_tokens, loop.new_blocks = 1, {}
    output = SchedulerOutput(loop.schedule(), loop.new_blocks)
    result = loop.work(loop.connector.build_connector_meta(output), output)
    assert (request.num_computed_tokens, request.tables) == (9, [[63, 62, 61]])
    request.num_computed_tokens = 0
    loop.connector.update_connector_output(result)
    assert loop.connector.get_num_new_matched_tokens(request, 12) == (0, False)
    request.num_computed_tokens = 12
    loop.connector.update_state_after_alloc(request, [[40, 41, 42, 43]], 0)
    again = SchedulerOutput({"a": 2}, {}, preempted_req_ids={"a"})
    assert loop.connector.build_connector_meta(again).stores == ()
    loop.connector.shutdown()
