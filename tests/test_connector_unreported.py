"""Steps that were planned and not reported: they may have run, and what they wrote over is stored no more."""

import pytest
from connector_loop import Loop, expected_output
from draft_loop import DraftLoop
from loop_model import make_config
from loop_tools import held, no_room, preempt_in_step

from jaxkv.connector import SchedulerOutput

PROMPT = list(range(100, 150))


def run_unreported(loop):
    """A step of which the connector never hears that it ran."""
    loop.preempted, loop.new_blocks = set(), {}
    output = SchedulerOutput(loop.schedule(), loop.new_blocks)
    loop.connector.handle_preemptions(loop.caches, loop.connector.build_connector_meta(output))
    loop.compute(output)
    loop.connector.wait_for_save(loop.caches)


def expect_right_bytes(loop, tokens):
    """Serve a prompt that begins with ``tokens``: the loop compares all that it reads."""
    loop.serve("second", [*tokens, 1, 2, 3], 2)
    assert loop.outputs["second"] == expected_output([*tokens, 1, 2, 3], 2)
    loop.close()


@pytest.mark.parametrize("then", ["goes on", "is aborted", "is preempted"])
def test_blocks_given_back_between_two_such_steps_are_stored_no_more(then):
    loop = Loop(config=make_config({"full": 1, "window": 1}), max_step_tokens=8)
    first = loop.add("first", PROMPT)
    loop.step()
    with no_room(loop):
        loop.max_step_tokens = 20
        run_unreported(loop)
        loop.max_step_tokens = 4
        loop.add("other", [7] * 4)
        run_unreported(loop)
    if then == "is aborted":
        loop.abort(first)
    if then == "is preempted":
        preempt_in_step(loop, first)
    loop.run()
    expect_right_bytes(loop, PROMPT[:8])


def test_blocks_given_back_for_a_step_that_leaves_their_request_out_are_stored_no_more():
    loop = Loop(config=make_config({"full": 1, "window": 1}), max_step_tokens=8)
    first = loop.add("first", PROMPT)
    loop.step()
    with no_room(loop):
        loop.max_step_tokens = 20
        run_unreported(loop)
        loop.running.remove(first)
        loop.skip_window(first)
        loop.add("other", [7] * 16)
        loop.step()
    loop.running.append(first)
    loop.run()
    expect_right_bytes(loop, PROMPT[:8])


def test_blocks_given_back_behind_such_a_step_are_stored_before_the_next():
    loop = Loop(config=make_config({"full": 1, "window": 1}), max_step_tokens=8)
    first = loop.add("first", PROMPT)
    loop.step()
    with no_room(loop):
        loop.max_step_tokens = 20
        run_unreported(loop)
    loop.run()
    assert held(loop, first, 1) >= {4, 8}
    expect_right_bytes(loop, PROMPT[:8])


def test_drafts_that_the_next_step_rejects_do_not_hide_what_such_a_step_computed():
    """Both together compute no more tokens than the next alone might have."""
    loop = DraftLoop(config=make_config({"full": 1, "window": 1}), num_drafts=16, offload_prompt_only=False)
    first = loop.add("first", PROMPT[:11], 60)
    loop.step()
    loop.step()
    loop.accept = lambda: 14
    run_unreported(loop)
    loop.accept = lambda: 0
    loop.add("other", [7] * 8)
    loop.step()
    assert first.num_computed_tokens == 27
    loop.run()
    expect_right_bytes(loop, first.tokens[:12])


def test_a_state_that_such_a_step_wrote_on_is_not_stored():
    loop = Loop(config=make_config({"full": 1, "state": 1}))
    loop.cuts_at_boundaries = True
    first = loop.add("first", PROMPT[:13], 8)
    loop.step()
    loop.step()
    assert first.num_computed_tokens == 12
    with no_room(loop):
        run_unreported(loop)
    preempt_in_step(loop, first)
    loop.run()
    expect_right_bytes(loop, PROMPT[:12])


def test_a_state_that_was_given_back_between_two_such_steps_is_not_stored():
    loop = Loop(config=make_config({"full": 1, "state": 1}))
    loop.add("first", PROMPT[:30], 8)
    loop.max_step_tokens = 8
    loop.step()
    with no_room(loop):
        run_unreported(loop)
        loop.add("other", [7] * 8)
        run_unreported(loop)
    loop.run()
    expect_right_bytes(loop, PROMPT[:8])


def test_a_request_that_was_admitted_again_behind_such_a_step_made_none():
    loop = Loop(config=make_config({"full": 1, "window": 1}))
    first = loop.add("first", PROMPT[:17], 2)
    run_unreported(loop)
    loop.preempt(first)
    loop.max_step_tokens = 8
    loop.run()
    assert held(loop, first, 1) == {4, 8, 12, 16}
    loop.close()


def test_what_such_a_step_computed_before_a_reset_is_not_stored_after_it():
    loop = Loop(config=make_config({"full": 1}), max_step_tokens=8)
    first = loop.add("first", PROMPT[:24], 4)
    loop.step()
    run_unreported(loop)
    run_unreported(loop)
    loop.connector.reset_cache()
    loop.run()
    assert held(loop, first, 0) == set()
    loop.close()
