"""Invariant 4 of the connector: a store reads blocks after they were written and before they are again."""

import pytest
from connector_loop import STATE_BLOCK, Loop, expected_output
from loop_model import make_config
from loop_tools import held, no_room, preempt_in_step, skipped

PROMPT = list(range(100, 150))
OTHER = list(range(500, 550))
NO_STATES = {"full": 1, "window": 1}


def blocks_of(request):
    """The blocks a request holds, by group."""
    return [{block for block in table if block is not None} for table in request.tables]


def share_blocks(before, after):
    """Whether in every group some block changed hands."""
    return all(old & new for old, new in zip(before, after, strict=True))


def check_served(loop, name, prompt, hit, num_new=3):
    """A later request is served from what was stored, and finds no byte of anybody else there."""
    assert loop.serve(name, prompt, num_new).host_hits == [hit]
    assert loop.outputs[name] == expected_output(prompt, num_new)
    loop.close()


def test_invariant_04_blocks_freed_by_a_finished_request_are_stored_before_another_writes_them():
    loop = Loop(max_step_tokens=24)
    first = loop.add("first", PROMPT[:24])
    loop.step()
    loop.add("second", OTHER[:24])
    before = blocks_of(first)
    loop.step()
    assert first.done
    loop.add("third", PROMPT[:1] + OTHER[:23])
    loop.step()
    (third,) = [request for request in loop.running if request.request_id == "third"]
    assert share_blocks(before, blocks_of(third)), "the blocks were taken while their store was planned"
    loop.run()
    check_served(loop, "again", PROMPT[:25], 24)


def test_invariant_04_blocks_of_a_preempted_request_are_stored_before_another_writes_them():
    loop = Loop(max_step_tokens=24)
    other = loop.add("other", OTHER[:8], 12)
    first = loop.add("first", PROMPT[:25], 3)
    loop.step()
    before = blocks_of(first)
    preempt_in_step(loop, first)
    assert share_blocks(before, blocks_of(other)), "the blocks were taken while their store was planned"
    loop.run()
    assert first.host_hits == [24]
    assert loop.outputs["first"] == expected_output(PROMPT[:25], 3)
    loop.close()


def test_invariant_04_blocks_behind_the_window_are_stored_before_they_are_written_again():
    """A step of 16 tokens leaves blocks that the next step, of the same request, takes for its own tokens."""
    loop = Loop(config=make_config(NO_STATES), max_step_tokens=16)
    first = loop.serve("first", PROMPT)
    assert held(loop, first, 1) == set(range(4, 49, 4))
    assert "released" not in skipped(loop, 1)
    for length in range(6, 50, 4):
        name = f"{length} tokens"
        assert loop.serve(name, PROMPT[:length], 2).host_hits == [length // 4 * 4]
        assert loop.outputs[name] == expected_output(PROMPT[:length], 2)
    loop.close()


def test_invariant_04_blocks_given_back_a_step_ago_are_stored_no_more():
    """The store is refused as long as the blocks are there; later they hold other tokens."""
    loop = Loop(config=make_config(NO_STATES), max_step_tokens=16)
    loop.add("first", PROMPT, 6)
    with no_room(loop):
        for _ in range(4):
            loop.step()
    loop.run()
    assert skipped(loop, 1)["released"]
    assert loop.serve("short", PROMPT[:21], 2).host_hits == []
    check_served(loop, "again", PROMPT, 48)


def test_invariant_04_blocks_given_back_by_a_request_that_is_left_out_of_a_step_are_stored_no_more():
    loop = Loop(config=make_config(NO_STATES), max_step_tokens=16)
    first = loop.add("first", PROMPT[:33], 6)
    with no_room(loop):
        loop.step()
        loop.step()
        loop.skip_window(first)
        loop.running.remove(first)
        loop.add("other", OTHER[:20], 9)
        loop.step()
    loop.running.append(first)
    loop.run()
    assert skipped(loop, 1)["released"]
    assert loop.serve("short", PROMPT[:29], 2).host_hits == []
    check_served(loop, "again", PROMPT[:33], 32)


def test_invariant_04_a_state_that_was_given_back_is_stored_no_more_when_the_request_ends():
    """Only ends of requests are kept: at 32 a step ended, but the request went on before that was its end."""
    loop = Loop(offload_prompt_only=False, retention_interval=0)
    loop.cuts_at_boundaries = True
    loop.add("first", PROMPT[:30], 6)
    loop.add("other", OTHER[:4], 40)
    loop.run()
    tokens = PROMPT[:30] + loop.outputs["first"]
    assert len(tokens) == 36
    again = loop.serve("again", tokens, 3)
    assert loop.outputs["again"] == expected_output(tokens, 3)
    assert again.host_hits == [28], "the prompt's last link"
    loop.close()


def test_invariant_04_a_block_copied_on_write_is_stored_as_it_was_before_the_copy():
    loop = Loop(config=make_config(NO_STATES), max_step_tokens=24)
    first = loop.add("first", PROMPT[:25], 9)
    loop.step()
    for group, free in enumerate(loop.free):
        old, new = first.tables[group][5], free.pop(0)
        loop.copies.append((group, old, new))
        first.tables[group][5] = new
        free.append(old)
    loop.connector.update_state_after_alloc(first, first.tables, 0)
    other = loop.add("other", OTHER[:24], 3)
    copied = [{old} for _, old, _ in loop.copies]
    loop.step()
    taken = [mine | others for mine, others in zip(blocks_of(first), blocks_of(other), strict=True)]
    assert share_blocks(copied, taken), "the originals are written in the step that stores them"
    loop.run()
    assert loop.outputs["first"] == expected_output(PROMPT[:25], 9)
    assert loop.outputs["other"] == expected_output(OTHER[:24], 3)
    check_served(loop, "again", PROMPT[:25], 24)


@pytest.mark.parametrize("ended_by", ["finished", "aborted"])
def test_invariant_04_blocks_given_to_a_load_are_stored_before_it_writes_them(ended_by):
    loop = Loop(max_step_tokens=24)
    loop.serve("stored", OTHER[:26])
    first = loop.add("first", PROMPT[:25], 1 if ended_by == "finished" else 20)
    loop.step()
    before = blocks_of(first)
    if ended_by == "aborted":
        loop.abort(first)
    else:
        loop.step()
        assert first.done
    loading = loop.add("loading", OTHER[:26], 2)
    loop.step()
    assert loading.host_hits == [24]
    assert share_blocks(before[:2], blocks_of(loading)[:2]), (
        "the load writes what the store of this step reads"
    )
    loop.run()
    assert loop.outputs["loading"] == expected_output(OTHER[:26], 2)
    check_served(loop, "again", PROMPT[:25], 24)


def test_invariant_04_a_step_is_stored_only_once_it_has_ended():
    loop = Loop(max_step_tokens=STATE_BLOCK)
    first = loop.add("first", PROMPT[:17])
    seen, build = [], loop.connector.build_connector_meta

    def note(output):
        metadata = build(output)
        blocks = [blocks for job in metadata.stores for blocks in job.blocks if blocks.group == 0]
        seen.append(sum(len(found.block_ids) for found in blocks))
        return metadata

    loop.connector.build_connector_meta = note
    loop.step()
    assert (first.num_computed_tokens, seen) == (8, [0])
    loop.step()
    assert seen == [0, 2]
    loop.run()
    loop.close()
