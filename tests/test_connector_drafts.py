"""Drafted tokens and drafters, and invariant 11: what may be rewritten is not stored, what cannot be is."""

import random

import pytest
from connector_loop import expected_output
from draft_loop import DraftLoop
from loop_model import make_config
from loop_tools import held

from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.serving import SamplingParams
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk
from jaxkv.serving.request import Request

PROMPT = list(range(100, 150))
PLAIN = {"full": 1, "window": 1}
DRAFTER = {"full": 1, "local": 1, "window": 1}


def rejecting():
    return 0


def all_tokens(loop, name, prompt):
    return prompt + loop.outputs[name]


@pytest.mark.parametrize("accept", [rejecting, lambda: 1, lambda: 3])
def test_invariant_11_what_a_rejected_draft_left_is_never_stored(accept):
    """A later request that starts from what was stored finds the bytes of accepted tokens alone."""
    loop = DraftLoop(config=make_config(PLAIN), offload_prompt_only=False, accept=accept)
    first = loop.serve("first", PROMPT[:11], 26)
    assert loop.outputs["first"] == expected_output(PROMPT[:11], 26)
    assert held(loop, first, 0) == set(range(4, 37, 4))
    tokens = all_tokens(loop, "first", PROMPT[:11])
    for length in range(6, 38, 3):
        again = loop.serve(f"{length} tokens", tokens[:length], 2)
        assert again.host_hits == [(length - 1) // 4 * 4]
    loop.close()


@pytest.mark.parametrize("seed", range(6))
def test_invariant_11_bytes_are_right_whatever_is_rejected(seed):
    draw = random.Random(seed)
    loop = DraftLoop(
        config=make_config(DRAFTER, 26, drafter="window", tokens_per_hash=draw.choice([2, 4])),
        offload_prompt_only=False,
        accept=lambda: draw.randrange(4),
        blocks_per_chunk=draw.choice([1, 2]),
        pool_bytes=1 << 16,
    )
    loop.finishes_first = draw.random() < 0.5
    stored = [[]]
    for number in range(12):
        base = draw.choice(stored)
        prompt = [*base[: draw.randrange(len(base) + 1)], *PROMPT[: draw.randrange(1, 20)]][:40]
        loop.add(f"r{number}", prompt, draw.randrange(1, 20))
        if draw.random() < 0.6:
            loop.run()
            assert loop.outputs[f"r{number}"] == expected_output(prompt, len(loop.outputs[f"r{number}"]))
            stored.append(all_tokens(loop, f"r{number}", prompt))
    loop.run()
    assert loop.connector.get_stats().loaded_bytes > 0
    loop.close()


def test_invariant_11_a_drafters_chunk_is_stored_once_the_next_link_is_known():
    loop = DraftLoop(config=make_config(PLAIN, drafter="window"), max_step_tokens=4)
    first = loop.add("first", PROMPT[:29])
    while loop.busy:
        loop.step()
        computed = first.num_computed_tokens
        assert held(loop, first, 0) <= set(range(4, computed + 1, 4))
        assert held(loop, first, 1) <= set(range(4, computed - 3, 4))
    assert held(loop, first, 0) == {4, 8, 12, 16, 20, 24, 28}
    assert held(loop, first, 1) == {4, 8, 12, 16, 20, 24}, "that of 28 would need the link at 32"
    loop.close()


def test_invariant_11_the_last_chunk_of_a_drafter_is_stored_when_it_can_no_longer_be_rewritten():
    loop = DraftLoop(config=make_config(PLAIN, drafter="window"), offload_prompt_only=False, accept=rejecting)
    first = loop.add("first", PROMPT[:11], 20)
    ends = []
    while loop.busy:
        loop.step()
        ends.append((first.num_computed_tokens, max(held(loop, first, 1), default=0)))
    for computed, end in ends:
        assert end + 4 <= computed, "its last position and the link behind it are computed"
    assert ends[-1] == (30, 24)
    loop.close()


def test_chunks_of_a_drafter_are_named_one_link_later_and_never_found_without_that_link():
    """Two prompts that differ in token 8: the drafter's chunk of tokens 4 to 7 is not the same in both."""
    loop = DraftLoop(config=make_config({"full": 1, "window": 1}, drafter="window"))
    loop.serve("first", PROMPT[:30])
    other = [*PROMPT[:8], 7, *PROMPT[9:30]]
    second = loop.serve("second", other, 3)
    assert second.host_hits == [4]
    assert loop.outputs["second"] == expected_output(other, 3)
    assert loop.serve("third", PROMPT[:30], 3).host_hits == [24]
    loop.close()


def test_a_drafter_whose_links_are_finer_than_its_blocks_waits_for_one_link_only():
    loop = DraftLoop(config=make_config(PLAIN, drafter="window", tokens_per_hash=2))
    first = loop.serve("first", PROMPT[:31])
    assert held(loop, first, 1) == set(range(4, 29, 4))
    assert loop.serve("second", PROMPT[:31], 3).host_hits == [28]
    loop.close()


@pytest.mark.parametrize("kind", ["full", "window", "local", "latent", "sink"])
def test_a_drafter_of_any_kind_of_attention_is_stored_and_found(kind):
    other = "full" if kind != "full" else "window"
    loop = DraftLoop(config=make_config({other: 1, kind: 1}, drafter=kind), offload_prompt_only=False)
    loop.serve("first", PROMPT[:23], 15)
    tokens = all_tokens(loop, "first", PROMPT[:23])
    second = loop.serve("second", [*tokens[:35], 1], 4)
    assert second.host_hits == [28], "the link at 36 is another"
    assert loop.connector.get_stats().groups[1].loaded_chunks > 0
    loop.close()


def device_request(name, tokens):
    chain = HashChain(ChainRoot("device", 4))
    return Request(name, tokens, SamplingParams(), chain=chain, arrival_s=0.0)


def test_the_device_prefix_cache_too_finds_a_drafters_block_by_the_link_behind_it():
    cache = CacheManager(make_config(PLAIN, drafter="window"), 64)
    first = device_request("first", PROMPT[:30])
    assert cache.admit(first, 0, 0, Chunk(0, 30, 32))
    cache.register(first, 28)
    assert cache.find_hit(device_request("same", PROMPT[:30])) == 24
    cache.register(first, 30)
    assert cache.find_hit(device_request("same", PROMPT[:30])) == 24, "the link at 32 is not known yet"
    other = device_request("other", [*PROMPT[:8], 7, *PROMPT[9:30]])
    assert cache.find_hit(other) == 4
    for token in PROMPT[30:33]:
        first.append_token(token, 0.0)
    assert cache.extend(first, Chunk(30, 32, 2))
    cache.register(first, 32)
    assert cache.find_hit(device_request("longer", PROMPT[:34])) == 28
