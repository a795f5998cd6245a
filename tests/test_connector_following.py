"""Stores that may follow the step they are planned in: which, when they are read, and that none is lost."""

import numpy as np
import pytest
from connector_loop import Loop, expected_output
from loop_model import make_config
from loop_tools import held, no_room
from workers_loop import WorkersLoop

from jaxkv.connector import KVConnectorOutput, SchedulerOutput
from jaxkv.keys import JobId
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

PROMPT = list(range(100, 150))
ATTENTION = {"full": 1, "latent": 1}


def watched(loop, log):
    """Notes which store is submitted when."""
    submit, compute = loop.worker.submit_store, loop.compute

    def submit_store(job, kv_caches):
        log.append(("store", job.may_follow_step))
        submit(job, kv_caches)

    def note_step(output):
        log.append("step")
        compute(output)

    loop.worker.submit_store, loop.compute = submit_store, note_step
    return loop


def test_the_store_of_a_running_request_is_read_behind_the_step():
    log = []
    loop = watched(Loop(config=make_config(ATTENTION)), log)
    request = loop.add("a", PROMPT, 8)
    loop.step()
    loop.step()
    assert log == ["step", "step", ("store", True)]
    loop.run()
    assert held(loop, request, 0)
    loop.close()


def test_the_store_of_a_request_that_has_ended_is_read_before_the_step():
    log = []
    loop = watched(Loop(config=make_config(ATTENTION), offload_prompt_only=False), log)
    loop.add("a", PROMPT[:13], 4)  # Its last step completes a block.
    loop.run()
    assert log[-2:] == [("store", False), "step"]
    loop.close()


def test_the_store_of_a_state_is_read_before_the_step():
    log = []
    loop = watched(Loop(config=make_config({"full": 1, "state": 1})), log)
    loop.add("a", PROMPT, 8)
    loop.step()
    loop.step()
    assert log == ["step", ("store", False), "step"]
    loop.run()
    loop.close()


def test_the_store_of_blocks_that_fall_out_of_the_window_is_read_before_the_step():
    log = []
    loop = watched(Loop(config=make_config({"window": 1}), max_step_tokens=32), log)
    loop.add("a", PROMPT, 8)
    loop.step()
    loop.step()
    assert ("store", False) in log
    assert ("store", True) not in log
    loop.run()
    loop.close()


def test_blocks_given_back_for_a_step_that_was_not_reported_are_read_before_the_step():
    """The loop knows of 40 tokens and gives the window's first blocks away, the connector knows of 8."""
    loop = Loop(config=make_config({"full": 1, "window": 1}), max_step_tokens=12)
    first = loop.add("first", PROMPT)
    loop.step()
    with no_room(loop):
        loop.max_step_tokens = 32
        loop.preempted, loop.new_blocks = set(), {}
        output = SchedulerOutput(loop.schedule(), loop.new_blocks)
        loop.work(loop.connector.build_connector_meta(output), output)
    assert first.num_computed_tokens == 40
    loop.max_step_tokens = 4
    for index in range(9):
        loop.add(f"other {index}", [index] * 10)
    loop.run()
    again = [*PROMPT[:8], 1, 2, 3]
    loop.serve("second", again, 2)
    assert loop.outputs["second"] == expected_output(again, 2)
    loop.close()


def without_saves(loop):
    """A loop that does not call ``wait_for_save``."""
    loop.connector.wait_for_save = lambda caches: caches
    return loop


def begin_step(loop):
    """Plan a step and begin it."""
    loop.preempted, loop.new_blocks = set(), {}
    output = SchedulerOutput(loop.schedule(), loop.new_blocks)
    metadata = loop.connector.build_connector_meta(output)
    return output, metadata, loop.connector.handle_preemptions(loop.caches, metadata)


def test_stores_that_nobody_asks_for_behind_a_step_are_read_before_a_later_one():
    log = []
    loop = without_saves(watched(Loop(config=make_config(ATTENTION)), log))
    request = loop.add("a", PROMPT, 8)
    for _ in range(4):
        loop.step()
    assert log == ["step", "step", "step", ("store", True), "step"]
    loop.run()
    assert held(loop, request, 0)
    loop.close()


def test_what_was_to_be_planned_behind_a_step_that_broke_off_is_planned_with_the_next():
    loop = Loop(config=make_config(ATTENTION))
    loop.add("a", PROMPT, 8)
    loop.step()
    _, metadata, _ = begin_step(loop)
    assert not metadata.stores
    metadata = loop.connector.build_connector_meta(SchedulerOutput())
    assert [blocks.block_ids.size for job in metadata.stores for blocks in job.blocks] == [4, 4]


def test_a_request_that_ends_before_its_stores_were_planned_loses_none():
    log = []
    loop = without_saves(watched(Loop(config=make_config(ATTENTION), offload_prompt_only=False), log))
    request = loop.add("a", PROMPT[:16], 1)
    loop.step()
    loop.step()
    assert request.done
    assert log == ["step", "step"]
    loop.run()
    assert log[2] == ("store", False)
    assert held(loop, request, 0) == {4, 8, 12, 16}
    loop.close()


def test_a_request_aborted_while_a_step_runs_is_stored_before_the_next():
    log = []
    loop = watched(Loop(config=make_config(ATTENTION)), log)
    request = loop.add("a", PROMPT, 8)
    loop.step()
    begin_step(loop)
    loop.abort(request)
    loop.connector.wait_for_save(loop.caches)
    assert log == ["step"]
    loop.connector.update_connector_output(KVConnectorOutput())
    loop.run()
    assert log[1] == ("store", False)
    assert held(loop, request, 0) == {4, 8, 12, 16}
    loop.close()


def test_a_reset_while_a_step_runs_leaves_nothing_to_be_planned_behind_it():
    log = []
    loop = watched(Loop(config=make_config(ATTENTION)), log)
    request = loop.add("a", PROMPT[:17], 8)
    loop.step()
    begin_step(loop)
    loop.connector.reset_cache()
    assert loop.connector.leaks() == ["request 'a' has not finished"]
    loop.connector.wait_for_save(loop.caches)
    assert log == ["step"]
    loop.connector.update_connector_output(KVConnectorOutput())
    loop.run()
    assert held(loop, request, 0) == set()
    loop.close()


def test_a_tail_that_was_refused_is_read_before_its_blocks_are_given_back():
    """No boundary needs the whole chunk around it, so what is to be stored next lies behind it."""
    options = {"num_kv_heads": 1, "head_size": 1, "dtype": np.int64}
    window = SlidingWindowSpec(4, page_size_bytes=32, sliding_window=3, **options)
    full = FullAttentionSpec(16, page_size_bytes=128, **options)
    config = KVCacheConfig(
        (KVCacheGroupSpec(("full.0",), full, 64), KVCacheGroupSpec(("window.0",), window, 64)), 2
    )
    loop = Loop(config=config, offload_prompt_only=False)
    first = loop.add("first", PROMPT[:23], 8)
    loop.step()
    with no_room(loop):
        while first.num_computed_tokens < 26:
            loop.step()
    log = []
    watched(loop, log)
    loop.add("other", [7] * 16)
    loop.step()
    assert log == [("store", False), "step"]
    loop.run()
    assert loop.serve("second", PROMPT[:23], 2).host_hits == [22]
    assert loop.outputs["second"] == expected_output(PROMPT[:23], 2)
    loop.close()


def test_several_workers_are_told_of_all_stores_when_a_step_begins():
    loop = WorkersLoop(config=make_config(ATTENTION))
    loop.add("a", PROMPT, 8)
    loop.step()
    _, metadata, _ = begin_step(loop)
    assert [job.may_follow_step for job in metadata.stores] == [True]


def test_what_was_to_follow_a_step_that_broke_off_is_read_before_the_next():
    log = []
    loop = watched(Loop(config=make_config(ATTENTION)), log)
    request = loop.add("a", PROMPT, 8)
    loop.step()
    wait_for_save = loop.connector.wait_for_save
    without_saves(loop)
    loop.step()
    loop.step()
    assert log == ["step", "step", "step"]
    assert loop.connector.has_pending_push_work()
    loop.step()
    loop.connector.wait_for_save = wait_for_save
    assert log == ["step", "step", "step", ("store", True), "step"]
    loop.run()
    assert held(loop, request, 0)
    loop.close()


@pytest.mark.parametrize("waits", [False, True])
def test_a_store_that_was_still_to_follow_at_the_end_has_failed(waits):
    loop = Loop(config=make_config(ATTENTION))
    wait_for_save = loop.connector.wait_for_save
    without_saves(loop).add("a", PROMPT, 8)
    loop.step()
    loop.step()
    _, metadata, _ = begin_step(loop)
    (job,) = metadata.stores
    assert job.may_follow_step
    if waits:
        wait_for_save(loop.caches)
    worker = loop.connector._open_worker
    worker.drain()
    worker.take_received()
    (result,) = worker.take_results()
    assert (result.job_id, result.error) == (
        JobId(job.job_id),
        None if waits else "the connector was shut down first",
    )
    loop.connector.update_connector_output(KVConnectorOutput())
    loop.connector.shutdown()
