"""The connector under a serving loop of full-attention, sliding-window and recurrent groups.

The loop checks every byte a token reads; see ``connector_loop``. Each test ends with the leak check.
"""

import random

import pytest
from connector_loop import STATE_BLOCK, Loop, expected_output

from jaxkv.connector import SchedulerOutput
from jaxkv.connector.lookup import Deferral
from jaxkv.keys import GroupId, make_offload_key
from jaxkv.offload import ReqContext
from jaxkv.testing.leaks import assert_no_leaks

PROMPT = list(range(100, 150))
HIT = 48


def skipped(loop, group):
    counts = loop.connector.get_stats().groups[group].skipped_chunks
    return {reason.value: count for reason, count in counts.items()}


def run_delayed(loop, *, steps_between=2, seed=0):
    """Runs the loop; jobs end late and in random order."""
    order = random.Random(seed)
    loop.worker.delayed = True
    for step in range(2000):
        if not loop.busy:
            loop.worker.delayed = False
            return
        loop.step()
        if step % steps_between == 0:
            ids = loop.worker.job_ids
            loop.worker.finish(order.sample(ids, k=len(ids)))
    raise AssertionError("the loop does not come to rest")


def test_host_continues_a_prompt_whose_device_blocks_are_gone():
    loop = Loop()
    first = loop.serve("first", PROMPT, 5)
    second = loop.serve("second", PROMPT, 5)
    assert (first.host_hits, second.host_hits) == ([], [HIT])
    assert loop.outputs["first"] == loop.outputs["second"] == expected_output(PROMPT, 5)
    assert loop.connector.get_stats().loaded_bytes > 0
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_shared_prefix_is_served_up_to_the_last_state_before_the_branch(blocks_per_chunk):
    loop = Loop(max_step_tokens=STATE_BLOCK, blocks_per_chunk=blocks_per_chunk)
    loop.serve("first", PROMPT)
    other = loop.serve("other", [*PROMPT[:35], 1, 2, 3, 4, 5, 6], 3)
    assert other.host_hits == [32]
    assert loop.outputs["other"] == expected_output([*PROMPT[:35], 1, 2, 3, 4, 5, 6], 3)
    loop.close()


def test_state_group_is_no_sliding_window_only_boundaries_a_step_ended_at_are_stored():
    loop = Loop(max_step_tokens=16)
    loop.serve("first", PROMPT)
    assert loop.connector.get_stats().groups[2].stored_chunks == 3
    assert skipped(loop, 2) == {"no_state": 3}
    assert loop.serve("short", PROMPT[:30]).host_hits == [16]
    loop.close()


def test_last_token_is_never_promised():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    loop.serve("first", PROMPT[: STATE_BLOCK * 3])
    assert loop.serve("same", PROMPT[: STATE_BLOCK * 3]).host_hits == [STATE_BLOCK * 2]
    loop.close()


def test_generated_tokens_are_stored_only_when_asked_for():
    prompt, turns = PROMPT[:20], {}
    for only in (True, False):
        loop = Loop(offload_prompt_only=only, max_step_tokens=STATE_BLOCK)
        loop.serve("first", prompt, 30)
        answer = loop.outputs["first"]
        turns[only] = loop.serve("second", [*prompt, *answer, 1], 2).host_hits
        loop.close()
    assert turns == {True: [16], False: [48]}


def test_chunks_that_were_loaded_are_not_offered_again():
    loop = Loop()
    loop.serve("first", PROMPT)
    stored = [group.stored_chunks for group in loop.connector.get_stats().groups]
    loop.serve("second", PROMPT)
    assert [group.stored_chunks for group in loop.connector.get_stats().groups] == stored
    assert "held" not in skipped(loop, 0)


def test_request_that_wants_all_its_chunks_offered_stores_none_twice():
    loop = Loop()
    loop.serve("first", PROMPT)
    stored = [group.stored_chunks for group in loop.connector.get_stats().groups]
    loop.serve("second", PROMPT, kv_transfer_params={"offload_policy": "request_level"})
    assert [group.stored_chunks for group in loop.connector.get_stats().groups] == stored
    assert skipped(loop, 0)["held"] == 12
    loop.close()


@pytest.mark.parametrize("seed", range(4))
def test_restored_bytes_are_those_stored_however_jobs_are_delayed_and_reordered(seed):
    """Few device blocks, freed ones reused at once: window skips, preemption and branches under slow jobs."""
    order = random.Random(seed)
    loop = Loop(num_blocks=24, pool_bytes=1 << 16, offload_prompt_only=False)
    prompts = {}
    for index in range(14):
        length = order.randrange(1, 60)
        prompts[f"r{index}"] = ([order.choice(PROMPT)] * order.randrange(0, 2) + PROMPT)[:length]
    for name, prompt in prompts.items():
        loop.add(name, prompt, order.randrange(1, 12))
        if order.random() < 0.5:
            run_delayed(loop, steps_between=order.randrange(1, 6), seed=seed)
    run_delayed(loop, steps_between=3, seed=seed)
    for name, prompt in prompts.items():
        assert loop.outputs[name] == expected_output(prompt, len(loop.outputs[name]))
    assert loop.connector.get_stats().loaded_bytes > 0
    loop.close()


def test_preempted_request_continues_from_what_was_complete():
    loop = Loop(num_blocks=22, max_step_tokens=STATE_BLOCK, offload_prompt_only=False)
    names = ["a", "b"]
    for index, name in enumerate(names):
        loop.add(name, [index, *PROMPT[:24]], 30)
    loop.run()
    assert loop.num_preemptions
    assert loop.connector.get_stats().hit_tokens > 0
    for index, name in enumerate(names):
        assert loop.outputs[name] == expected_output([index, *PROMPT[:24]], 30)
    loop.close()


def test_blocks_skipped_behind_the_window_are_stored_before_they_are_overwritten():
    loop = Loop(num_blocks=40)
    loop.add("a", PROMPT)
    loop.add("b", [9, *PROMPT])
    loop.run()
    assert loop.connector.get_stats().groups[1].stored_chunks == 24
    assert "released" not in skipped(loop, 1)
    for name, prompt in (("a", PROMPT), ("b", [9, *PROMPT])):
        assert loop.serve(f"{name} again", prompt, 2).host_hits == [HIT]
    loop.close()


def test_request_waits_for_a_chunk_that_is_being_written():
    loop = Loop()
    loop.worker.delayed = True
    loop.add("first", PROMPT)
    for _ in range(6):
        loop.step()
    second = loop.add("second", PROMPT)
    loop.step()
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (None, False)
    assert second in loop.waiting
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert second.host_hits == [HIT]
    loop.close()


def test_request_with_a_load_in_flight_is_told_to_ask_again():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second = loop.add("second", PROMPT)
    loop.step()
    assert second.request_id in loop.loading
    assert loop.connector.get_loaded_kv_cache_group_ids(second) == (GroupId(0), GroupId(1), GroupId(2))
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (None, False)
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    loop.close()


def test_request_that_wants_chunks_another_is_loading_waits_for_that_load():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    both = [loop.add("second", PROMPT), loop.add("third", PROMPT)]
    other = loop.add("other", [7, *PROMPT])
    for _ in range(3):
        loop.step()
        assert list(loop.loading) == ["second"]
    assert other in loop.running or other.done, "who wants other chunks does not wait"
    assert loop.connector.get_stats().deferred[Deferral.LOADING] == 3
    run_delayed(loop)
    assert [request.host_hits for request in both] == [[HIT], [HIT]]
    loop.close()


@pytest.mark.parametrize("end", ["failed", "aborted", "aborted before it was sent"])
def test_request_that_waits_for_the_load_of_another_goes_on_however_that_ends(end):
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second, third = loop.add("second", PROMPT), loop.add("third", PROMPT)
    if end == "aborted before it was sent":
        loop.preempted, loop.new_blocks = set(), {}
        loop.admit(second, {})
        assert loop.connector.get_num_new_matched_tokens(third, 0) == (None, False)
    else:
        loop.step()
    if end == "failed":
        loop.worker.fail = lambda job: "told to fail" if job.req_id == "second" else None
    else:
        loop.abort(second)
    run_delayed(loop)
    assert third.done
    assert third.tokens[len(PROMPT) :] == expected_output(PROMPT, 1)
    loop.close()


def test_promise_is_kept_until_the_next_meta_and_then_dropped():
    loop = Loop(pool_bytes=32 * 512, slab_bytes=4 * 512)
    loop.serve("first", PROMPT[:26])
    asking = loop.add("asking", PROMPT[:26])
    loop.waiting.remove(asking)
    assert loop.connector.get_num_new_matched_tokens(asking, 0) == (24, True)
    assert loop.connector.leaks()
    loop.serve("other", [5] * 50)
    assert not [leak for leak in loop.connector.leaks() if "chunk" in leak]
    loop.abort(asking)
    loop.run()
    loop.close()


def test_aborted_request_keeps_its_blocks_until_its_load_has_landed():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second = loop.add("second", PROMPT)
    loop.step()
    loop.abort(second)
    assert loop.aborted_loading
    assert loop.connector.has_pending_block_frees()
    assert loop.connector.has_pending_push_work()
    loop.add("other", [3] * 40, 2)
    for _ in range(4):
        loop.step()
    assert loop.aborted_loading
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    loop.close()


def test_the_load_of_an_aborted_request_is_called_off_and_its_chunks_stay():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second = loop.add("second", PROMPT)
    loop.step()
    (job_id,) = loop.worker.job_ids
    loop.abort(second)
    loop.step()
    loop.worker.finish([job_id])
    loop.step()
    assert not loop.aborted_loading
    stats = loop.connector.get_stats()
    assert [group.failed_load_chunks + group.loaded_chunks for group in stats.groups] == [0, 0, 0]
    loop.worker.delayed = False
    third = loop.serve("third", PROMPT)
    assert third.host_hits == [HIT]
    loop.close()


def test_request_aborted_before_its_load_was_sent_frees_at_once():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    loop.preempted, loop.new_blocks = set(), {}
    loop.schedule()
    assert loop.connector.request_finished_all_groups(second, second.tables) == (False, None)
    loop.release(loop.loading.pop("second"))
    loop.run()
    loop.close()


def test_failed_load_is_named_forgotten_and_recomputed():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.fail = lambda job: "the medium is gone" if job.req_id == "second" else None
    second = loop.serve("second", PROMPT, 4)
    failure = loop.failures["second"]
    assert failure.error == "the medium is gone"
    assert {group for group, _ in failure.blocks} == {0, 1, 2}
    assert len(failure.blocks) == 12 + 3 + 1
    assert second.host_hits == [HIT], "it must not load what could not be loaded again"
    assert loop.outputs["second"] == expected_output(PROMPT, 4)
    assert loop.connector.get_stats().groups[0].failed_load_chunks == 12
    loop.worker.fail = lambda _: None
    loop.close()


def test_failed_store_is_a_miss_and_nothing_else():
    loop = Loop()
    loop.worker.fail = lambda _: "full disk"
    loop.serve("first", PROMPT)
    assert loop.connector.get_stats().groups[0].failed_store_chunks == 12
    loop.worker.fail = lambda _: None
    assert loop.serve("second", PROMPT).host_hits == []
    assert loop.serve("third", PROMPT).host_hits == [HIT]
    loop.close()


def test_promised_hit_never_exceeds_what_every_group_holds():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    first = loop.serve("first", PROMPT)
    manager = loop.spec.get_manager()
    gone = [make_offload_key(first.block_hashes[9], GroupId(1))]
    manager.prepare_load(gone, ReqContext("x"))
    manager.complete_load(gone, ReqContext("x"), success=False)
    assert loop.serve("second", PROMPT, 3).host_hits == [32]
    loop.close()


def test_reset_with_jobs_in_flight_leaves_nothing_loadable_and_nothing_behind():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    loading = loop.add("loading", PROMPT, 3)
    loop.add("storing", [1, *PROMPT])
    for _ in range(3):
        loop.step()
    assert loading.request_id in loop.loading
    assert loop.connector.reset_cache()
    run_delayed(loop)
    assert loop.outputs["loading"] == expected_output(PROMPT, 3)
    assert_no_leaks(loop.connector)
    assert loop.serve("again", [1, *PROMPT]).host_hits == []
    loop.close()


def test_chunks_computed_before_a_reset_are_not_stored_after_it():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    loop.add("first", PROMPT)
    for _ in range(3):
        loop.step()
    loop.connector.reset_cache()
    loop.run()
    assert loop.connector.get_stats().groups[0].stored_chunks == 4 + 6, "those of the third step are missing"
    assert loop.serve("second", PROMPT).host_hits == []
    loop.close()


def test_last_chunks_of_a_finished_request_are_stored_in_an_empty_step():
    loop = Loop(max_step_tokens=64)
    loop.add("first", PROMPT[:25])
    while loop.running or loop.waiting:
        loop.step()
    assert loop.connector.has_pending_push_work()
    loop.run()
    assert loop.serve("second", PROMPT[:26]).host_hits == [24]
    loop.close()


def test_step_that_broke_off_is_not_stored():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    first = loop.add("first", PROMPT)
    loop.step()
    loop.preempted, loop.new_blocks = set(), {}
    scheduled = loop.schedule()
    metadata = loop.connector.build_connector_meta(SchedulerOutput(scheduled, loop.new_blocks))
    loop.connector.handle_preemptions(loop.caches, metadata)
    loop.preempt(first)
    loop.finished_ids, carried = set(), loop.preempted
    metadata = loop.connector.build_connector_meta(SchedulerOutput(preempted_req_ids=carried))
    assert metadata.stores == ()
    loop.run()
    assert first.host_hits == [STATE_BLOCK]
    loop.close()


def test_shutdown_in_the_middle_of_everything_leaves_no_slot():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    loop.add("loading", PROMPT)
    loop.add("storing", [1, *PROMPT])
    for _ in range(3):
        loop.step()
    loop.connector.shutdown()
    loop.connector.shutdown()
    assert not loop.pool.live
