"""A router that reads the connector's events knows what is loadable, and what it means."""

from __future__ import annotations

import json

import pytest
from connector_loop import Loop, LoopRequest

from jaxkv.connector import AllBlocksCleared, BlockRemoved, BlockStored, event_to_json
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.key_parts import CacheKeyParts
from jaxkv.keys import GroupId, make_offload_key
from jaxkv.offload.base import LookupResult, ReqContext

PREFIX = list(range(1, 17))


class Router:
    """Keeps the hashes that are loadable, by group, and every token sequence it was told of."""

    def __init__(self):
        self.loadable: dict[tuple[int, bytes], tuple[int, ...]] = {}
        self.prefixes: dict[bytes | None, tuple[int, ...]] = {None: ()}

    def read(self, events):
        for event in events:
            match event:
                case BlockStored():
                    self._store(event)
                case BlockRemoved():
                    for block_hash in event.block_hashes:
                        del self.loadable[event.group_idx, block_hash]
                case AllBlocksCleared():
                    self.loadable.clear()

    def _store(self, event):
        tokens = self.prefixes.get(event.parent_block_hash)
        for place, block_hash in enumerate(event.block_hashes):
            first = place * event.block_size
            chunk = event.token_ids[first : first + event.block_size]
            known = None if tokens is None else tokens + chunk
            assert (event.group_idx, block_hash) not in self.loadable, "stored twice without a removal"
            self.loadable[event.group_idx, block_hash] = chunk
            if known is not None:
                self.prefixes[block_hash] = tokens = known


def prompts():
    return [PREFIX[: 4 * (seed % 4 + 1)] + [100 + seed] * 17 for seed in range(10)]


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_events_say_exactly_what_lookups_find_through_evictions_and_resets(blocks_per_chunk):
    loop = Loop(
        pool_bytes=2048, slab_bytes=512, enable_events=True, self_describing_events=True,
        blocks_per_chunk=blocks_per_chunk,
    )  # fmt: skip
    manager, router, seen, removed = loop.spec.get_manager(), Router(), set(), 0
    for number, prompt in enumerate(prompts()):
        request = loop.serve(str(number), prompt)
        seen |= {make_offload_key(h, GroupId(g)) for h in request.block_hashes for g in range(3)}
        if number == 6:
            loop.connector.reset_cache()
        events = loop.connector.take_events()
        removed += sum(isinstance(event, BlockRemoved) for event in events)
        json.dumps([event_to_json(event) for event in events])
        router.read(events)
        found = {key for key in seen if manager.lookup(key, ReqContext("r")) is LookupResult.HIT}
        assert found == {make_offload_key(h, GroupId(g)) for g, h in router.loadable}
    assert removed > 0
    loop.close()


def test_prefixes_read_from_events_have_the_hashes_they_are_told_under():
    loop = Loop(enable_events=True, self_describing_events=True, offload_prompt_only=False)
    router = Router()
    for number, prompt in enumerate(prompts()):
        loop.serve(str(number), prompt, max_new_tokens=6)
        router.read(loop.connector.take_events())
    assert len(router.prefixes) > 20
    for block_hash, tokens in router.prefixes.items():
        hashes = HashChain(ChainRoot("loop", 4), token_ids=tokens).block_hashes
        assert (hashes[-1] if hashes else None) == block_hash
    loop.close()


def test_events_of_a_request_name_its_adapter():
    loop = Loop(enable_events=True, self_describing_events=True)
    request = LoopRequest("r", PREFIX)
    request.key_parts = CacheKeyParts(lora_name="sql")
    loop.connector.on_new_request(request)
    loop.waiting.append(request)
    loop.run()
    events = loop.connector.take_events()
    assert {event.lora_name for event in events} == {"sql"}
    assert all(set(event.extra_keys) == {(("lora", "sql", ""),)} for event in events)
    loop.close()


def test_a_store_that_fails_is_no_event_and_is_not_remembered():
    loop = Loop(enable_events=True, self_describing_events=True)
    loop.worker.fail = lambda job: "no"
    loop.serve("r", PREFIX)
    assert not loop.connector.take_events()
    assert not loop.connector._open_scheduler._events._under_way
    loop.close()


def test_a_loop_that_takes_no_events_pays_for_none():
    loop = Loop()
    loop.serve("r", PREFIX)
    log = loop.connector._open_scheduler._events
    assert [log._under_way, log._ended, log._taken_early] == [{}, [], []]
    assert loop.connector.take_events() == ()
    loop.close()
