"""Events say what a router must know, in order, and remember nothing they need not."""

import gc
import json
import weakref
from dataclasses import dataclass, field

import pytest

from jaxkv.connector import AllBlocksCleared, BlockRemoved, BlockStored, event_to_json
from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.events import EventLog
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.key_parts import CacheKeyParts, MultiModalInput
from jaxkv.keys import KeyRun, KeyRuns, OffloadKey
from jaxkv.offload.base import OffloadingEvent
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

CONFIG = KVCacheConfig(
    (
        KVCacheGroupSpec(("a",), FullAttentionSpec(4, 1, 2, "float32"), 10),
        KVCacheGroupSpec(("b",), SlidingWindowSpec(4, 1, 2, "float32", 8), 10),
        KVCacheGroupSpec(("c",), MambaSpec(8, ((3,),), ("float32",)), 10),
    ),
    tokens_per_hash=2,
)
FULL, WINDOW, STATE = range(3)
STEP = {FULL: 4, WINDOW: 4, STATE: 8}  # hashes a chunk of two blocks


class Backend:
    """Announces what it is told to."""

    def __init__(self):
        self.events = []

    def stored(self, *keys, medium="host"):
        self.events.append(OffloadingEvent(keys, medium, removed=False))

    def removed(self, *keys, medium="host"):
        self.events.append(OffloadingEvent(keys, medium, removed=True))

    def take_events(self):
        taken, self.events = self.events, []
        return taken

    def reset_cache(self):
        self.removed(OffloadKey(b"?" * 20))


@dataclass(eq=False)
class ARequest:
    key_parts: CacheKeyParts = field(default_factory=CacheKeyParts)
    num_tokens: int = 40
    base: int = 100

    def __post_init__(self):
        self.token_ids = list(range(self.base, self.base + self.num_tokens))
        self.block_hashes = HashChain(ChainRoot("m", 2), self.key_parts, self.token_ids).block_hashes

    def run(self, group, first, count):
        return KeyRun(self.block_hashes, group, (first + 1) * STEP[group] - 1, STEP[group], count)

    def tail(self, group, end_tokens):
        return KeyRun(self.block_hashes, group, end_tokens // 2 - 1, STEP[group], 1)


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def log():
    return EventLog(ChunkedCaches(CONFIG, 2), enabled=True, self_describing=True)


def store(log, backend, request, *runs):
    keys = KeyRuns(runs)
    log.store_started(1, request, keys)
    log.store_ended(1, success=True)
    backend.stored(*keys)


def test_neighbouring_chunks_are_one_event_with_parent_and_tokens(log, backend):
    request = ARequest()
    store(log, backend, request, request.run(FULL, 1, 3))
    assert log.take(backend) == (
        BlockStored(
            block_hashes=tuple(request.block_hashes[i] for i in (7, 11, 15)),
            block_size=8,
            group_idx=FULL,
            medium="host",
            kv_cache_spec_kind="full_attention",
            parent_block_hash=request.block_hashes[3],
            token_ids=tuple(range(108, 132)),
            extra_keys=((), (), ()),
        ),
    )


def test_the_first_chunk_has_no_parent(log, backend):
    request = ARequest()
    store(log, backend, request, request.run(FULL, 0, 1))
    (event,) = log.take(backend)
    assert (event.parent_block_hash, event.token_ids) == (None, tuple(range(100, 108)))


def test_groups_come_apart_and_say_what_kind_they_are(log, backend):
    request = ARequest()
    store(log, backend, request, request.run(FULL, 0, 1), request.run(WINDOW, 0, 1), request.run(STATE, 0, 2))
    events = log.take(backend)
    assert [
        (e.group_idx, e.kv_cache_spec_kind, e.kv_cache_spec_sliding_window, e.block_size) for e in events
    ] == [
        (FULL, "full_attention", None, 8),
        (WINDOW, "sliding_window", 8, 8),
        (STATE, "mamba", None, 16),
    ]
    assert events[2].token_ids == tuple(range(100, 132))


def test_a_gap_a_tail_and_another_request_begin_a_new_event(log, backend):
    first, second = ARequest(), ARequest(base=500)
    ours = KeyRuns([first.run(FULL, 2, 1), first.tail(FULL, 28), first.run(FULL, 0, 1)])
    theirs = KeyRuns([second.run(FULL, 1, 1), second.run(FULL, 3, 1)])
    log.store_started(1, first, ours)
    log.store_started(2, second, theirs)
    log.store_ended(1, success=True)
    log.store_ended(2, success=True)
    backend.stored(*ours, *theirs)
    events = log.take(backend)
    assert [(e.token_ids[0], len(e.token_ids), e.block_size) for e in events] == [
        (116, 8, 8),
        (124, 4, 4),
        (100, 8, 8),
        (508, 8, 8),
        (524, 8, 8),
    ]


def test_what_a_hash_covers_beside_tokens_is_told_for_each_chunk(log, backend):
    request = ARequest(CacheKeyParts("salt", "lora", "2", (MultiModalInput("cat", 6, 4),)))
    store(log, backend, request, request.run(FULL, 0, 2))
    (event,) = log.take(backend)
    lora = ("lora", "lora", "2")
    assert event.lora_name == "lora"
    assert event.extra_keys == ((lora, ("mm", "cat", 6), ("cache_salt", "salt")), (lora, ("mm", "cat", -2)))


def test_chunks_nobody_stored_from_here_are_told_by_their_hash(log, backend):
    ours, foreign = ARequest(), ARequest(base=500)
    log.store_started(1, ours, KeyRuns([ours.run(FULL, 0, 1)]))
    log.store_ended(1, success=True)
    backend.stored(*foreign.run(FULL, 0, 2), *ours.run(FULL, 0, 1), *foreign.run(FULL, 2, 1))
    events = log.take(backend)
    assert [event.block_hashes for event in events] == [
        tuple(foreign.block_hashes[i] for i in (3, 7)),
        (ours.block_hashes[3],),
        (foreign.block_hashes[11],),
    ]
    assert [bool(event.token_ids) for event in events] == [False, True, False]


def test_a_failed_store_is_forgotten(log, backend):
    request = ARequest()
    log.store_started(1, request, KeyRuns([request.run(FULL, 0, 1)]))
    log.store_ended(1, success=False)
    backend.stored(*request.run(FULL, 0, 1))
    assert log.take(backend)[0].token_ids == ()


def test_removals_need_no_request_and_keep_their_place(log, backend):
    request = ARequest()
    run = request.run(FULL, 0, 1)
    store(log, backend, request, run)
    backend.removed(*run, medium="disk")
    store(log, backend, request, run)
    stored, removed, again = log.take(backend)
    assert removed == BlockRemoved((request.block_hashes[3],), FULL, "disk")
    assert stored == again
    backend.removed(*run)
    assert log.take(backend) == (BlockRemoved((request.block_hashes[3],), FULL, "host"),)


def test_a_reset_is_one_event_behind_what_came_before_it(log, backend):
    request = ARequest()
    store(log, backend, request, request.run(FULL, 0, 1))
    log.reset(backend)
    store(log, backend, request, request.run(FULL, 1, 1))
    first, cleared, second = log.take(backend)
    assert cleared == AllBlocksCleared()
    assert (first.token_ids[0], second.token_ids[0]) == (100, 108)
    assert log.take(backend) == ()


def test_tokens_that_a_request_does_not_show_are_left_out(log, backend):
    request = ARequest()
    del request.token_ids, request.key_parts
    store(log, backend, request, request.run(FULL, 1, 1))
    (event,) = log.take(backend)
    assert (event.token_ids, event.extra_keys) == ((), ((),))
    assert event.parent_block_hash == request.block_hashes[3]


def test_nothing_is_remembered_of_requests_whose_events_were_taken(log, backend):
    request = ARequest()
    store(log, backend, request, request.run(FULL, 0, 1))
    log.take(backend)
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None


def test_events_without_description_hold_no_request(backend):
    log = EventLog(ChunkedCaches(CONFIG, 2), enabled=True)
    request = ARequest()
    run = request.run(WINDOW, 1, 2)
    log.store_started(1, request, KeyRuns([run]))
    hashes, gone = request.block_hashes, weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None
    log.store_ended(1, success=True)
    backend.stored(*run)
    assert log.take(backend) == (
        BlockStored((hashes[7], hashes[11]), 8, WINDOW, "host", "sliding_window", 8),
    )


def test_a_log_that_is_off_tells_nothing(backend):
    log = EventLog(ChunkedCaches(CONFIG, 2), enabled=False, self_describing=True)
    request = ARequest()
    store(log, backend, request, request.run(FULL, 0, 1))
    log.reset(backend)
    assert log.take(backend) == ()


def test_events_can_be_written_as_json(log, backend):
    request = ARequest(CacheKeyParts(lora_name="l"), num_tokens=8)
    store(log, backend, request, request.run(FULL, 0, 1))
    backend.removed(*request.run(FULL, 0, 1))
    log_events = [*log.take(backend), AllBlocksCleared()]
    stored, removed, cleared = json.loads(json.dumps([event_to_json(event) for event in log_events]))
    block_hash = request.block_hashes[3].hex()
    assert stored == {
        "type": "BlockStored",
        "block_hashes": [block_hash],
        "block_size": 8,
        "group_idx": 0,
        "medium": "host",
        "kv_cache_spec_kind": "full_attention",
        "kv_cache_spec_sliding_window": None,
        "parent_block_hash": None,
        "token_ids": list(range(100, 108)),
        "lora_name": "l",
        "extra_keys": [[["lora", "l", ""]]],
    }
    assert removed == {"type": "BlockRemoved", "block_hashes": [block_hash], "group_idx": 0, "medium": "host"}
    assert cleared == {"type": "AllBlocksCleared"}
