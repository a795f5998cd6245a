"""``reset_cache`` at every stage of a step: what was computed before it is not stored after it."""

import pytest
from connector_loop import Loop
from loop_model import make_config

from jaxkv.connector import SchedulerOutput

PROMPT = list(range(100, 150))


def step_up_to_the_report(loop):
    loop.preempted, loop.new_blocks = set(), {}
    output = SchedulerOutput(loop.schedule(), loop.new_blocks)
    return loop.work(loop.connector.build_connector_meta(output), output)


def stored(loop):
    return loop.connector.get_stats().groups[0].stored_chunks


def test_request_that_ended_in_a_step_that_a_reset_interrupts_is_not_stored():
    loop = Loop(config=make_config({"full": 1}), max_step_tokens=64)
    loop.add("first", PROMPT[:8])
    result = step_up_to_the_report(loop)
    loop.finish_done()
    loop.connector.reset_cache()
    loop.connector.update_connector_output(result)
    loop.run()
    assert stored(loop) == 0
    loop.close()


def test_tokens_the_loop_speaks_of_only_after_a_reset_are_not_stored():
    loop = Loop(config=make_config({"full": 1}), max_step_tokens=32)
    first = loop.add("first", PROMPT)
    result = step_up_to_the_report(loop)
    computed, first.num_computed_tokens = first.num_computed_tokens, 0
    loop.connector.update_connector_output(result)
    loop.connector.reset_cache()
    first.num_computed_tokens = computed
    loop.run()
    assert (computed, stored(loop)) == (32, 4)
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_chunk_that_was_begun_before_a_reset_is_not_stored_after_it(blocks_per_chunk):
    loop = Loop(config=make_config({"full": 1}), max_step_tokens=10, blocks_per_chunk=blocks_per_chunk)
    loop.cuts_at_boundaries = True
    first = loop.add("first", PROMPT[:32])
    loop.step()
    assert first.num_computed_tokens == 10
    loop.connector.reset_cache()
    loop.run()
    assert stored(loop) == {1: 5, 2: 2}[blocks_per_chunk]
    loop.close()
