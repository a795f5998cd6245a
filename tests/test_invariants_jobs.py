"""Invariants 8 and 13 of the connector: when a job is done, and that nothing is left of it."""

import random

import pytest
from connector_loop import Loop, expected_output
from loop_tools import CTX, held, key_of, preempt_in_step
from workers_loop import WorkersLoop

from jaxkv.connector.jobs import JobKind, JobTable
from jaxkv.keys import JobId
from jaxkv.offload import JobResult, LookupResult
from jaxkv.testing.leaks import assert_no_leaks

PROMPT = list(range(100, 150))


def test_invariant_08_a_store_is_done_when_every_worker_has_reported_it():
    loop = WorkersLoop()
    loop.workers[1].delayed = True
    first = loop.add("first", PROMPT)
    for _ in range(6):
        loop.step()
    assert first.done
    lookup = loop.spec.get_manager().lookup
    assert lookup(key_of(loop, first, 0, 16), CTX) is LookupResult.HIT_PENDING
    assert loop.connector.get_num_new_matched_tokens(second := loop.add("second", PROMPT), 0) == (None, False)
    loop.workers[1].delayed = False
    loop.workers[1].finish()
    loop.step()
    assert lookup(key_of(loop, first, 0, 16), CTX) is LookupResult.HIT
    loop.run()
    assert second.host_hits == [48]
    loop.close()


@pytest.mark.parametrize("late", [0, 1])
def test_invariant_08_a_request_is_received_when_every_worker_has_received_it(late):
    loop = WorkersLoop()
    loop.serve("first", PROMPT)
    loop.workers[late].delayed = True
    second = loop.add("second", PROMPT, 3)
    for _ in range(4):
        loop.step()
        assert second.request_id in loop.loading
        assert second.num_computed_tokens == 48, "nothing is computed yet"
    loop.delay(delayed=False)
    loop.run()
    assert loop.outputs["second"] == expected_output(PROMPT, 3)
    loop.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_invariant_08_one_worker_that_fails_fails_the_job(failing):
    loop = WorkersLoop()
    loop.workers[failing].fail = lambda _: "full disk"
    first = loop.serve("first", PROMPT)
    assert [held(loop, first, group) for group in range(3)] == [set()] * 3
    assert loop.connector.get_stats().groups[0].failed_store_chunks == 12
    loop.workers[failing].fail = lambda job: "gone" if job.req_id == "third" else None
    loop.serve("second", PROMPT)
    third = loop.serve("third", PROMPT, 3)
    assert third.host_hits == [48]
    assert loop.failures["third"].error == "gone"
    assert loop.outputs["third"] == expected_output(PROMPT, 3)
    assert loop.connector.get_stats().groups[0].failed_load_chunks == 12
    loop.close()


def test_invariant_08_a_receive_that_failed_is_named_when_the_last_worker_has_stopped_writing():
    loop = WorkersLoop()
    loop.serve("first", PROMPT)
    loop.workers[0].fail = lambda _: "gone"
    loop.workers[1].delayed = True
    second = loop.add("second", PROMPT, 3)
    for _ in range(3):
        loop.step()
        assert "second" not in loop.failures, "the other worker still writes its blocks"
    loop.workers[0].fail = lambda _: None
    loop.delay(delayed=False)
    loop.run()
    assert set(loop.failures) == {"second"}
    assert second.tokens[50:] == expected_output(PROMPT, 3)
    loop.close()


@pytest.mark.parametrize("seed", range(4))
def test_invariant_08_bytes_are_right_however_the_workers_fall_apart(seed):
    draw = random.Random(seed)
    loop = WorkersLoop(num_blocks=28, offload_prompt_only=False, pool_bytes=1 << 16)
    loop.delay(delayed=True)
    prompts = {f"r{index}": [*PROMPT[: draw.randrange(1, 40)], index] for index in range(8)}
    for worker in loop.workers:
        worker.fail = lambda _: "told to fail" if draw.random() < 0.1 else None
    for name, prompt in prompts.items():
        loop.add(name, prompt, draw.randrange(1, 10))
    for _ in range(500):
        if not loop.busy:
            break
        loop.step()
        worker = draw.choice(loop.workers)
        worker.finish(draw.sample(worker.job_ids, draw.randrange(len(worker.job_ids) + 1)))
    assert not loop.busy
    for name, prompt in prompts.items():
        assert loop.outputs[name] == expected_output(prompt, len(loop.outputs[name]))
    loop.close()


def test_invariant_08_a_job_ends_with_the_last_report_the_first_error_and_all_bytes():
    jobs = JobTable(num_workers=3)
    job = jobs.start(JobKind.STORE, CTX, [], (), None)
    assert jobs.report(JobResult(job.job_id, 10, 0.5)) is None
    assert jobs.report(JobResult(job.job_id, 0, 2.0, "no room")) is None
    _, result = jobs.report(JobResult(job.job_id, 30, 1.0, "too late"))
    assert result == JobResult(job.job_id, 40, 2.0, "no room")
    assert len(jobs) == 0


def test_invariant_08_reports_of_jobs_that_are_over_or_unknown_are_ignored():
    jobs = JobTable()
    job = jobs.start(JobKind.STORE, CTX, [], (), None)
    assert jobs.report(JobResult(job.job_id, 0, 0.0)) is not None
    assert jobs.report(JobResult(job.job_id, 0, 0.0)) is None
    assert jobs.report(JobResult(JobId(77), 0, 0.0)) is None


def stop_while_storing(loop):
    """``first`` has been computed, and all its stores are under way."""
    loop.worker.delayed = True
    first = loop.add("first", PROMPT)
    for _ in range(8):
        loop.step()
    assert first.done
    return first


def test_invariant_08_completions_from_before_a_reset_make_nothing_loadable():
    loop = Loop()
    first = stop_while_storing(loop)
    assert loop.connector.reset_cache()
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert [held(loop, first, group) for group in range(3)] == [set()] * 3
    assert not loop.pool.live
    assert loop.serve("second", PROMPT).host_hits == []
    assert loop.serve("third", PROMPT).host_hits == [48]
    loop.close()


@pytest.mark.parametrize("in_step", [False, True])
def test_invariant_08_what_was_computed_before_a_reset_is_not_stored_after_it(in_step):
    """Weights may have changed: neither what is due is stored, nor what a running step computes."""
    loop = Loop(max_step_tokens=8)
    first = loop.add("first", PROMPT[:30])
    loop.step()
    loop.step()
    if in_step:
        compute, loop.compute = loop.compute, lambda output: (compute(output), loop.connector.reset_cache())
        loop.step()
        loop.compute = compute
    else:
        loop.connector.reset_cache()
    loop.run()
    ends = [held(loop, first, group) for group in range(3)]
    assert ends == ([{28}, {28}, set()] if in_step else [{20, 24, 28}, {20, 24, 28}, {24}])
    loop.close()


def test_invariant_08_what_a_finished_request_left_is_not_stored_after_a_reset():
    loop = Loop(max_step_tokens=64)
    first = loop.add("first", PROMPT[:24])
    while not first.done:
        loop.step()
    loop.connector.reset_cache()
    loop.run()
    assert [held(loop, first, group) for group in range(3)] == [set()] * 3
    loop.close()


def test_invariant_08_slots_being_written_are_given_to_nobody_after_a_reset():
    """The pool is reset while it is written: until the writes have ended its slots stay where they are."""
    loop = Loop(pool_bytes=32 * 512, slab_bytes=4 * 512)
    stop_while_storing(loop)
    written = {slot.offset for slot in loop.pool.live}
    loop.connector.reset_cache()
    assert {slot.offset for slot in loop.pool.live} == written
    for step in range(3):
        loop.add(f"other {step}", [step, *PROMPT])
        for _ in range(6):
            loop.step()
        assert loop.connector.get_stats().backend.num_quarantined
    loop.worker.finish()
    loop.worker.delayed = False
    loop.run()
    assert loop.serve("again", PROMPT, 2).host_hits == []
    assert loop.outputs["again"] == expected_output(PROMPT, 2)
    loop.close()


def test_invariant_08_a_late_completion_is_not_taken_for_that_of_a_newer_store_of_the_same_chunk():
    loop = Loop()
    first = stop_while_storing(loop)
    loop.connector.reset_cache()
    again = loop.add("again", PROMPT)
    for _ in range(6):
        loop.step()
    assert again.done
    loop.worker.finish(loop.worker.job_ids)
    loop.step()
    lookup = loop.spec.get_manager().lookup
    assert lookup(key_of(loop, first, 0, 16), CTX) is LookupResult.MISS
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    loop.close()


# -- 13 -------------------------------------------------------------------------------------------------


def steps(loop, count):
    for _ in range(count):
        loop.step()


def abort_waiting(loop):
    loop.abort(loop.add("second", PROMPT))


def abort_promised(loop):
    second = loop.add("second", PROMPT)
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (48, True)
    loop.abort(second)


def abort_unsent(loop):
    second = loop.add("second", PROMPT)
    loop.schedule()
    assert second.request_id in loop.loading
    loop.abort(second)


def abort_loading(loop):
    loop.worker.delayed = True
    second = loop.add("second", PROMPT)
    steps(loop, 2)
    loop.abort(second)
    steps(loop, 2)


def abort_storing(loop):
    loop.worker.delayed = True
    second = loop.add("second", [1, *PROMPT], 20)
    steps(loop, 6)
    loop.abort(second)


def preempt_running(loop):
    second = loop.add("second", [1, *PROMPT], 5)
    steps(loop, 3)
    preempt_in_step(loop, second)


def fail_load(loop):
    loop.worker.fail = lambda job: "gone" if job.req_id == "second" else None
    loop.add("second", PROMPT, 3)


def fail_store(loop):
    loop.worker.fail = lambda _: "full disk"
    loop.add("second", [1, *PROMPT], 3)


def reset(loop):
    loop.worker.delayed = True
    loop.add("loading", PROMPT, 3)
    loop.add("storing", [1, *PROMPT], 3)
    steps(loop, 4)
    loop.connector.reset_cache()


def unsent(loop):
    loop.add("second", PROMPT)
    loop.schedule()


def promised(loop):
    loop.waiting.remove(second := loop.add("second", PROMPT))
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (48, True)


STAGES = [
    abort_waiting,
    abort_promised,
    abort_unsent,
    abort_loading,
    abort_storing,
    preempt_running,
    fail_load,
    fail_store,
    reset,
]


@pytest.mark.parametrize("end", STAGES)
def test_invariant_13_nothing_is_left_after(end):
    loop = Loop()
    loop.serve("first", PROMPT)
    end(loop)
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert_no_leaks(loop.connector)
    backend = loop.connector.get_stats().backend
    assert (backend.num_busy, backend.num_quarantined) == (0, 0)
    assert not loop.connector._scheduler._requests
    assert len(loop.pool.live) == backend.num_chunks
    loop.connector.reset_cache()
    assert not loop.pool.live, "every slot was a chunk's"
    loop.close()


@pytest.mark.parametrize("end", [*STAGES, promised, unsent])
def test_invariant_13_nothing_is_left_after_a_shutdown_in_the_middle_of(end):
    loop = Loop()
    loop.serve("first", PROMPT)
    end(loop)
    scheduler, manager = loop.connector._scheduler, loop.spec.get_manager()
    loop.connector.shutdown()
    assert (scheduler.leaks(), list(manager.leaks()), loop.pool.live) == ([], [], set())


def test_invariant_13_the_leak_check_names_what_is_held():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    named = []
    second = loop.add("second", PROMPT)
    named.append(loop.connector.leaks())
    loop.connector.get_num_new_matched_tokens(second, 0)
    named.append(loop.connector.leaks())
    loop.step()
    named.append(loop.connector.leaks())
    loop.add("third", [1, *PROMPT[:7]])
    loop.step()
    named.append(loop.connector.leaks())
    expected = [
        "'second' has not finished",
        "was promised",
        "(LOAD) has not been",
        "has chunks that were not",
    ]
    for leaks, text in zip(named, expected, strict=True):
        assert any(text in leak for leak in leaks), leaks
    assert any("has 1 uses" in leak or "in use" in leak for leak in named[1]), "a pin"
    with pytest.raises(AssertionError, match="still holds"):
        assert_no_leaks(loop.connector)
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    loop.close()
