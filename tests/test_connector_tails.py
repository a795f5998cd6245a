"""The last, incomplete chunk of a prompt: stored as it is at the last link of the hash chain, and hit."""

import pytest
from connector_loop import Loop, expected_output
from engine_loop import LAYERS, EngineLoop
from loop_model import make_config
from loop_tools import held, holds, no_room, skipped
from toy_model import random_prompt

PROMPT = list(range(100, 150))
PLAIN = {"full": 1, "window": 1}
CUTS = [(4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (2, 3)]
"""Tokens per link of the chain, blocks per chunk."""
KINDS = [*((kind,) for kind in LAYERS if kind != "local"), ("full", "local"), tuple(LAYERS)]


@pytest.mark.parametrize(("link", "blocks_per_chunk"), CUTS)
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_every_kind_of_layer_is_hit_at_the_last_link_of_a_prompt(kinds, link, blocks_per_chunk):
    loop = EngineLoop(kinds, tokens_per_hash=link, blocks_per_chunk=blocks_per_chunk)
    for length in (3, 30, 41):
        prompt = random_prompt(length, length)
        last_link = (length - 1) // link * link
        loop.serve(f"first of {length}", prompt, 2)
        assert loop.serve(f"second of {length}", prompt, 5).host_hit_tokens == last_link
        longer = [*prompt, *random_prompt(1, 20)]
        assert loop.serve(f"longer than {length}", longer, 5).host_hit_tokens == last_link
        assert (
            loop.serve(f"again longer than {length}", longer, 3).host_hit_tokens
            == (length + 19) // link * link
        )
    loop.close()


@pytest.mark.parametrize(("link", "blocks_per_chunk"), CUTS)
def test_a_tail_continues_a_hit_of_the_device_that_ends_within_a_chunk(link, blocks_per_chunk):
    """The device holds 16 or 24 tokens, wherever they end in a chunk of 8, 16 or 24."""
    loop = EngineLoop(tokens_per_hash=link, blocks_per_chunk=blocks_per_chunk)
    prompt = random_prompt(0, 39)
    loop.serve("first", prompt)
    loop.serve("warm", prompt[:17])
    metrics = loop.serve("second", prompt, 4, forget=False)
    assert metrics.device_hit_tokens == 16
    assert metrics.device_hit_tokens + metrics.host_hit_tokens == 38 // link * link
    loop.close()


def test_the_cut_block_is_continued_and_then_stored_whole():
    """Three turns: each starts in the middle of a block that another left, and stores it complete."""
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2), offload_prompt_only=False)
    tokens, hits = PROMPT[:7], []
    for turn in range(5):
        request = loop.serve(f"turn {turn}", tokens, 6)
        hits += request.host_hits
        assert loop.outputs[f"turn {turn}"] == expected_output(tokens, 6)
        tokens = [*tokens, *loop.outputs[f"turn {turn}"], turn]
    assert hits == [12, 16, 24, 32], "the last whole chunk, or the prompt's last link where that is further"
    loop.close()


def test_a_tail_that_was_loaded_is_not_offered_again():
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2))
    loop.serve("first", PROMPT[:47])
    assert loop.serve("second", PROMPT[:47]).host_hits == [46]
    assert [skipped(loop, group).get("held", 0) for group in (0, 1)] == [0, 0]
    loop.close()


def test_a_tail_is_kept_beside_the_whole_chunk_that_begins_alike():
    """Prompts of 46 and 50 tokens: the chunk of tokens 44 to 47, once cut at 46 and once whole."""
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2))
    short = loop.serve("short", PROMPT[:47])
    loop.serve("long", PROMPT)
    assert holds(loop, short, 0, 46)
    assert loop.serve("short again", PROMPT[:47], 3).host_hits == [46]
    assert loop.serve("long again", PROMPT, 3).host_hits == [48]
    assert loop.outputs["short again"] == expected_output(PROMPT[:47], 3)
    loop.close()


def test_a_refused_tail_is_offered_again_while_its_blocks_are_held():
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2), max_step_tokens=64)
    first = loop.add("first", PROMPT[:47], 4)
    with no_room(loop):
        for _ in range(3):
            loop.step()
    assert skipped(loop, 0)["refused"]
    assert not holds(loop, first, 0, 46)
    loop.run()
    assert loop.serve("second", PROMPT[:47], 3).host_hits == [46]
    assert loop.outputs["second"] == expected_output(PROMPT[:47], 3)
    loop.close()


def test_a_refused_tail_whose_window_has_passed_is_given_up():
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2), max_step_tokens=64)
    first = loop.add("first", PROMPT[:47], 20)
    with no_room(loop):
        for _ in range(16):
            loop.step()
    loop.run()
    assert not holds(loop, first, 1, 46)
    assert loop.serve("second", PROMPT[:47], 3).host_hits == []
    assert loop.outputs["second"] == expected_output(PROMPT[:47], 3)
    loop.close()


@pytest.mark.parametrize(("cuts", "hit"), [(True, 44), (False, 40)])
def test_a_tail_of_a_state_needs_a_step_that_ended_there(cuts, hit):
    loop = Loop(max_step_tokens=64)
    loop.cuts_at_boundaries = cuts
    first = loop.serve("first", PROMPT[:46], 6)
    assert holds(loop, first, 2, 44) == cuts
    assert loop.serve("second", PROMPT[:46], 3).host_hits == [hit]
    assert loop.outputs["second"] == expected_output(PROMPT[:46], 3)
    loop.close()


def test_a_refused_tail_with_a_state_that_was_overwritten_since_is_given_up():
    loop = Loop(max_step_tokens=64)
    loop.cuts_at_boundaries = True
    loop.add("first", PROMPT[:46], 6)
    with no_room(loop):
        for _ in range(4):
            loop.step()
    loop.run()
    assert skipped(loop, 2)["no_state"]
    assert loop.serve("second", PROMPT[:46], 3).host_hits == []
    assert loop.outputs["second"] == expected_output(PROMPT[:46], 3)
    loop.close()


@pytest.mark.parametrize(("limit", "hit"), [(45, 44), (46, 46), (0, None)])
def test_a_tail_behind_the_tokens_a_request_lets_be_stored_is_not_stored(limit, hit):
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2))
    loop.serve("first", PROMPT[:47], kv_transfer_params={"max_offload_tokens": limit})
    assert loop.serve("second", PROMPT[:47]).host_hits == ([] if hit is None else [hit])
    loop.close()


def test_a_prompt_that_ends_with_a_chunk_has_no_tail():
    """Of 49 tokens 48 are hit, and those are whole chunks: nothing is stored twice."""
    loop = Loop(config=make_config(PLAIN, tokens_per_hash=2))
    first = loop.serve("first", PROMPT[:49])
    assert loop.connector.get_stats().groups[0].stored_chunks == 12
    assert held(loop, first, 0) == set(range(4, 49, 4))
    assert loop.connector.get_snapshot_boundaries(first) == (48,)
    loop.close()


def test_a_preempted_request_whose_tail_was_stored_goes_on_from_it():
    loop = Loop(config=make_config(PLAIN, 26, tokens_per_hash=2), offload_prompt_only=False)
    for name in ("a", "b"):
        loop.add(name, [ord(name), *PROMPT[:44]], 12)
    loop.run()
    assert loop.num_preemptions
    for name in ("a", "b"):
        assert loop.outputs[name] == expected_output([ord(name), *PROMPT[:44]], 12)
    loop.close()
