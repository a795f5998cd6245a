"""Invariants 5 and 6 of the connector: what a load writes to nobody touches, and nobody reads too early."""

import pytest
from connector_loop import Loop, expected_output
from engine_loop import EngineLoop
from loop_tools import held
from toy_model import random_prompt

from jaxkv.connector import SchedulerOutput
from jaxkv.serving import EngineConfig
from jaxkv.serving.chunking import Chunk

PROMPT = list(range(100, 150))


def held_blocks(loop, name):
    """``(group, block)`` of all blocks of a request of an engine."""
    tables = loop.cache._held[name].tables
    return {(group, block) for group, table in enumerate(tables) for block in table.block_ids()} - {
        (group, None) for group in range(len(tables))
    }


def start_loading(num_blocks=64, prompt_tokens=50, **options):
    """An engine in which ``second`` waits for a load of all but the last tokens of ``first``."""
    loop = EngineLoop(num_blocks=num_blocks, **options)
    prompt = random_prompt(0, prompt_tokens)
    loop.serve("first", prompt)
    loop.worker.delayed = True
    loop.engine.reset_prefix_cache()
    loop.add("second", prompt, 3)
    loop.step()
    assert "second" in loop.scheduler._loading
    return loop, prompt


def land(loop):
    """Let all transfers end, and requests with them."""
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()


@pytest.mark.parametrize("num_steps", [0, 5])
def test_invariant_05_blocks_of_an_aborted_load_are_not_given_to_others_before_it_has_landed(num_steps):
    """The load writes garbage until it lands, then its pages: whoever got its blocks would lose theirs."""
    loop = Loop(num_blocks=30)
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second = loop.add("second", PROMPT)
    loop.step()
    targets = [{block for block in table if block is not None} for table in second.tables]
    loop.abort(second)
    assert loop.connector.has_pending_block_frees()
    loop.add("other", [7, *PROMPT[:20]], 12)
    for _ in range(num_steps):
        loop.step()
        for request in loop.running:
            assert all(
                table.isdisjoint(mine) for table, mine in zip(map(set, request.tables), targets, strict=True)
            )
    assert list(loop.aborted_loading) == ["second"]
    loop.worker.delayed = False
    loop.worker.finish()
    loop.run()
    assert not loop.connector.has_pending_block_frees()
    assert loop.outputs["other"] == expected_output([7, *PROMPT[:20]], 12)
    loop.close()


def test_invariant_05_a_load_that_no_worker_saw_frees_its_blocks_at_once():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT)
    loop.schedule()
    assert loop.connector.request_finished_all_groups(second, second.tables) == (False, None)
    loop.release(loop.loading.pop("second"))
    metadata = loop.connector.build_connector_meta(SchedulerOutput())
    assert metadata.loads == ()
    assert loop.serve("third", PROMPT).host_hits == [48], "and costs no chunk"
    loop.close()


def test_invariant_05_the_engine_keeps_blocks_of_an_aborted_load_until_it_has_landed():
    loop, _ = start_loading(num_blocks=(30, 14, 6))
    targets = held_blocks(loop, "second")
    loop.engine.abort("second")
    loop.add("other", random_prompt(1, 40), 12)
    for _ in range(6):
        loop.step()
        if "other" in loop.cache._held:
            assert targets.isdisjoint(held_blocks(loop, "other"))
    assert "second" in loop.scheduler, "its id is in use as long as its blocks are"
    land(loop)
    assert "second" not in loop.scheduler
    loop.close()


def test_invariant_05_blocks_being_loaded_are_not_in_the_device_prefix_cache():
    loop, prompt = start_loading()
    for group, pool in enumerate(loop.cache.pools):
        for owner, block in held_blocks(loop, "second"):
            assert owner != group or pool._hash_of[block] is None
    loop.add("third", prompt, 2)
    for _ in range(3):
        loop.step()
    assert "third" not in loop.metrics, "it wants what is being loaded, and waits"
    land(loop)
    assert loop.metrics["third"].device_hit_tokens == 48, "then the device has it"
    loop.close()


def test_invariant_05_a_load_under_way_is_not_preempted_for_one_that_needs_blocks():
    loop, _ = start_loading(num_blocks=(26, 20, 6))
    targets = held_blocks(loop, "second")
    loop.add("hungry", random_prompt(1, 40), 20)
    for _ in range(25):
        loop.step()
        assert held_blocks(loop, "second") == targets
    assert loop.cache.pools[0].num_free == 0, "hungry waits for the load"
    land(loop)
    assert loop.metrics.keys() >= {"second", "hungry"}
    loop.close()


def test_invariant_05_a_load_under_way_keeps_its_blocks_when_a_step_breaks_off():
    loop, _ = start_loading()
    targets = held_blocks(loop, "second")
    loop.add("other", random_prompt(2, 10), 20)
    programs, loop.engine._programs = loop.engine._programs, None
    with pytest.raises(TypeError):
        loop.step()
    loop.engine._programs = programs
    loop.step()
    loop.step()
    assert held_blocks(loop, "second") == targets
    assert targets.isdisjoint(held_blocks(loop, "other"))
    land(loop)
    assert loop.metrics["second"].host_hit_tokens == 48
    loop.close()


def test_invariant_05_blocks_for_the_first_chunk_are_reserved_with_those_of_the_load():
    """Loads that all wait for one more block would wait for ever: a load that has landed can go on."""
    loop, prompt = start_loading(num_blocks=(16, 16, 4), engine=EngineConfig(prefill_shapes=(4, 32)))
    request = loop.scheduler._requests["second"]
    while loop.cache.pools[0].num_free:
        loop.cache.pools[0].allocate()
    for pool in loop.cache.pools[1:]:
        while pool.num_free:
            pool.allocate()
    assert loop.cache.extend(request, Chunk(48, len(prompt), 4)), "its blocks were taken at admission"


def test_invariant_05_several_loads_into_a_pool_that_just_holds_them_all_get_on():
    loop = EngineLoop(num_blocks=(26, 26, 9), engine=EngineConfig(prefill_shapes=(4, 32)))
    prompts = {f"r{index}": random_prompt(index, 50) for index in range(4)}
    for name, prompt in prompts.items():
        loop.serve(name, prompt)
    loop.engine.reset_prefix_cache()
    loop.worker.delayed = True
    for name, prompt in prompts.items():
        loop.add(f"{name} again", prompt, 9)
    for _ in range(4):
        loop.step()
    assert len(loop.scheduler._loading) == 2
    land(loop)
    assert all(loop.metrics[f"{name} again"].host_hit_tokens == 48 for name in prompts)
    loop.close()


def test_invariant_06_nothing_is_computed_before_the_load_has_landed():
    loop, _ = start_loading()
    request = loop.scheduler._requests["second"]
    for _ in range(5):
        plan = loop.scheduler.schedule
        seen = []
        loop.scheduler.schedule = lambda plan=plan, seen=seen: seen.append(plan()) or seen[0]
        loop.step()
        loop.scheduler.schedule = plan
        assert "second" not in seen[0].output.num_scheduled_tokens
        assert request.num_computed_tokens == 0
    land(loop)
    assert loop.metrics["second"].host_hit_tokens == 48
    loop.close()


def test_invariant_06_a_failed_load_names_the_request_and_every_block_it_did_not_fill():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    second = loop.add("second", PROMPT, 4)
    loop.step()
    targets = {
        (group, block)
        for group, table in enumerate(second.tables)
        for block in table[: 12 if group < 2 else 6]
        if block is not None
    }
    loop.worker.fail = lambda job: "the medium is gone" if job.req_id == "second" else None
    loop.worker.finish()
    loop.worker.delayed = False
    loop.run()
    failure = loop.failures["second"]
    assert failure.error == "the medium is gone"
    assert set(failure.blocks) == targets
    assert loop.outputs["second"] == expected_output(PROMPT, 4)
    loop.close()


def test_invariant_06_a_failed_load_is_not_tried_again_and_costs_no_other_data():
    loop = Loop(max_step_tokens=8)
    first, other = loop.serve("first", PROMPT), loop.serve("other", [7, *PROMPT])
    before = [held(loop, other, group) for group in range(3)]
    loop.worker.fail = lambda job: "gone" if job.req_id == "second" else None
    second = loop.serve("second", PROMPT, 4)
    assert second.host_hits == [48], "what could not be read is asked for once"
    assert [held(loop, other, group) for group in range(3)] == before
    assert loop.serve("other again", [7, *PROMPT], 2).host_hits == [48]
    loop.worker.fail = lambda _: None
    assert held(loop, first, 2) == {8, 16, 24, 32, 40}, "of states only the one that was asked for is lost"
    loop.close()


def test_invariant_06_after_a_failure_the_request_starts_from_the_last_boundary_all_groups_still_hold():
    """The device holds 16 tokens, the host 48; reading what lies between fails, so 16 are left."""
    loop = EngineLoop()
    prompt = random_prompt(0, 50)
    loop.serve("first", prompt)
    loop.serve("short", prompt[:18])
    loop.worker.fail = lambda job: "gone" if job.req_id == "second" else None
    loop.add("second", prompt, 3)
    loop.run()
    metrics = loop.metrics["second"]
    assert (metrics.device_hit_tokens, metrics.host_hit_tokens) == (16, 0)
    assert loop.connector.get_stats().groups[0].failed_load_chunks == 8
    loop.close()
