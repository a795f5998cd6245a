"""What a request asks for, seen from the loop: how much is loaded, stored and offered to the backend."""

import pytest
from connector_loop import Loop, expected_output
from engine_loop import EngineLoop
from loop_model import make_config
from loop_tools import forget, held, holds, skipped
from toy_model import random_prompt

PROMPT = list(range(100, 150))
PLAIN = {"full": 1, "window": 1}


@pytest.mark.parametrize(
    ("limit", "hit"), [(None, 48), (100, 48), (48, 48), (47, 44), (30, 28), (3, None), (0, None)]
)
def test_no_more_is_loaded_than_a_request_allows(limit, hit):
    loop = Loop(config=make_config(PLAIN))
    loop.serve("first", PROMPT)
    second = loop.serve("second", PROMPT, 3, kv_transfer_params={"max_load_tokens": limit})
    assert second.host_hits == ([] if hit is None else [hit])
    assert loop.outputs["second"] == expected_output(PROMPT, 3)
    loop.close()


@pytest.mark.parametrize(("limit", "host_hit"), [(16, 16), (10, 8), (100, 32)])
def test_the_limit_of_a_load_counts_from_the_hit_of_the_device(limit, host_hit):
    loop = EngineLoop(("full", "window"))
    prompt = random_prompt(0, 50)
    loop.serve("first", prompt)
    loop.serve("short", prompt[:18])
    metrics = loop.serve("second", prompt, 3, forget=False, kv_transfer_params={"max_load_tokens": limit})
    assert (metrics.device_hit_tokens, metrics.host_hit_tokens) == (16, host_hit)
    loop.close()


@pytest.mark.parametrize("prompt_only", [True, False])
@pytest.mark.parametrize(("limit", "last"), [(None, 48), (20, 20), (23, 20), (3, 0), (0, 0)])
def test_no_more_is_stored_than_a_request_allows(limit, last, prompt_only):
    loop = Loop(config=make_config(PLAIN), offload_prompt_only=prompt_only)
    params = {"max_offload_tokens": limit}
    first = loop.serve("first", PROMPT, 12, kv_transfer_params=params)
    end = 60 if limit is None and not prompt_only else last
    assert held(loop, first, 0) == set(range(4, end + 1, 4))
    loop.close()


def test_generated_tokens_count_where_a_request_limits_what_is_stored():
    loop = Loop(config=make_config(PLAIN), offload_prompt_only=False)
    first = loop.serve("first", PROMPT[:10], 30, kv_transfer_params={"max_offload_tokens": 26})
    assert held(loop, first, 0) == {4, 8, 12, 16, 20, 24}
    loop.close()


def test_a_request_that_reads_no_cache_computes_all_and_stores_all():
    loop = EngineLoop()
    prompt = random_prompt(0, 50)
    loop.serve("first", prompt)
    loop.connector.reset_cache()
    metrics = loop.serve("second", prompt, forget=False, reads_caches=False)
    assert (metrics.device_hit_tokens, metrics.host_hit_tokens) == (0, 0)
    assert loop.serve("third", prompt).host_hit_tokens == 48
    loop.close()


def offered_by(loop):
    """``{request: keys}`` of what requests offer to the backend from now on."""
    offered, manager = {}, loop.spec.get_manager()
    prepare = manager.prepare_stores

    def note(offers):
        for keys, ctx in offers:
            offered.setdefault(ctx.req_id, []).extend(keys)
        return prepare(offers)

    manager.prepare_stores = note
    return offered


def test_a_request_offers_what_was_computed_here_or_all_it_has():
    """What was loaded the backend holds already: only who wants everything offered offers that again."""
    loop = Loop(config=make_config(PLAIN))
    loop.serve("first", PROMPT[:30])
    offered = offered_by(loop)
    loop.serve("computed", PROMPT[:45])
    loop.serve("all", PROMPT[:45], kv_transfer_params={"offload_policy": "request_level"})
    computed, everything = [{key for key in keys if key[-1] == 0} for keys in offered.values()]
    assert len(computed) == 4, "chunks that end at 32, 36, 40 and 44"
    assert len(everything) == 11
    assert computed < everything
    assert skipped(loop, 0) == {"held": 11}
    loop.close()


def test_what_the_device_lent_is_offered_and_so_comes_back_to_the_host():
    """The host has lost what the device still holds; a request that only shares it there stores it again."""
    loop = EngineLoop(("full", "window"))
    prompt = random_prompt(0, 50)
    loop.serve("first", prompt)
    loop.connector.reset_cache()
    assert loop.serve("second", prompt, forget=False).device_hit_tokens == 48
    assert loop.serve("third", prompt).host_hit_tokens == 48
    loop.close()


def test_what_the_host_lost_while_a_request_was_loaded_is_stored_again_where_all_is_offered():
    loop = Loop(config=make_config(PLAIN))
    first = loop.serve("first", PROMPT)
    second = loop.add("second", PROMPT, 3, kv_transfer_params={"offload_policy": "request_level"})
    loop.step()
    loop.step()
    forget(loop, first, 0, [8, 40])
    assert not holds(loop, first, 0, 40)
    loop.run()
    assert second.host_hits == [48]
    assert held(loop, first, 0) == set(range(4, 49, 4))
    loop.close()
