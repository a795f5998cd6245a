"""How far the host can continue a prefix, and what that takes; the backend answers what a test says."""

import pytest
from connector_loop import LoopRequest, hybrid_config
from loop_model import make_config

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.lookup import Deferral, HostPresence, Question, find_hit
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.keys import GroupId, OffloadKey
from jaxkv.offload import LookupResult, OffloadingManager, ReqContext

FULL, WINDOW, STATE = GroupId(0), GroupId(1), GroupId(2)
LATENT, LOCAL, SINK = GroupId(0), GroupId(1), GroupId(2)
REQUEST = LoopRequest("r", list(range(100)))
CACHES = ChunkedCaches(hybrid_config(), 1)
CTX = ReqContext("r")


class AskedManager(OffloadingManager):
    """Answers lookups with a function; holds nothing."""

    def __init__(self, answer):
        self.answer = answer
        self.asked_by = []

    def lookup(self, key, ctx):
        self.asked_by.append(ctx)
        return self.answer(key)

    prepare_load = complete_load = prepare_store = complete_store = touch = reset_cache = None


def find(answer, *, known=0, limit=99, caches=CACHES, takes_retry_as_miss=False):
    question = Question(REQUEST.block_hashes, known, min(limit, caches.hashed_tokens(REQUEST.block_hashes)))
    presence = HostPresence(
        caches,
        question,
        AskedManager(answer),
        CTX,
        takes_retry_as_miss=takes_retry_as_miss,
    )
    return find_hit(caches, question, presence)


def chunks(hit):
    return tuple((span.group, chunk) for span in hit.spans for chunk in span.chunks)


def answers(**by_group):
    """A lookup that answers from ``{group: {index: result}}`` and misses otherwise."""
    known: dict[OffloadKey, LookupResult] = {}
    for name, results in by_group.items():
        group = {"full": FULL, "window": WINDOW, "state": STATE}[name]
        for index, result in results.items():
            (key,) = CACHES.keys(REQUEST.block_hashes, group, range(index, index + 1))
            known[key] = result
    return lambda key: known.get(key, LookupResult.MISS)


def hits(*indices, **others):
    return {**dict.fromkeys(indices, LookupResult.HIT), **others}


def test_hit_takes_the_chunks_each_kind_of_attention_reads():
    caches, asked = ChunkedCaches(make_config({"latent": 1, "local": 1, "sink": 1}), 1), []

    def lookup(key):
        asked.append(key)
        return LookupResult.HIT

    found = find(lookup, limit=35, caches=caches)
    assert found.boundary_tokens == 32
    assert chunks(found) == (
        *((LATENT, index) for index in range(8)),
        *((LOCAL, index) for index in (6, 7)),
        *((SINK, index) for index in (0, 1, 5, 6, 7)),
    )
    assert set(asked) == set(found.keys), "nothing else is looked up"
    continued = find(lookup, known=28, limit=35, caches=caches)
    assert chunks(continued) == tuple((group, 7) for group in (LATENT, LOCAL, SINK))


def test_hit_is_limited_by_the_group_that_holds_least():
    lookup = answers(full=hits(*range(8)), window=hits(*range(6)), state=hits(0, 1, 2, 3))
    found = find(lookup)
    assert found.boundary_tokens == 24
    assert chunks(found) == (
        *((FULL, index) for index in range(6)),
        *((WINDOW, index) for index in (3, 4, 5)),
        (STATE, 2),
    )


def test_pending_chunk_that_the_hit_needs_defers_it():
    lookup = answers(full=hits(0) | {1: LookupResult.HIT_PENDING}, window=hits(0, 1), state=hits(0))
    assert find(lookup) is Deferral.PENDING


def test_pending_chunk_that_the_hit_does_not_need_defers_nothing():
    lookup = answers(full=hits(0, 1) | {2: LookupResult.HIT_PENDING}, window=hits(0, 1), state=hits(0))
    assert find(lookup).boundary_tokens == 8


def test_backend_that_asks_to_retry_defers_the_hit():
    lookup = answers(full=hits(0, 1), window=hits(0, 1), state={0: LookupResult.RETRY})
    assert find(lookup) is Deferral.RETRY


def test_backend_that_asks_to_retry_for_too_long_is_taken_to_hold_nothing():
    lookup = answers(full=hits(0, 1), window=hits(0, 1), state={0: LookupResult.RETRY})
    found = find(lookup, takes_retry_as_miss=True)
    assert (found.boundary_tokens, found.branch_tokens) == (0, 8)


def test_hit_goes_on_to_a_tail_that_every_group_kept():
    """Behind 8 tokens: a whole chunk of full attention and of the window, and a state cut at 12."""
    lookup = answers(full=hits(0, 1, 2), window=hits(0, 1, 2), state=hits(0))
    (tail,) = CACHES.tail_key(REQUEST.block_hashes, STATE, 12)

    def with_tail(key):
        return LookupResult.HIT if key == tail else lookup(key)

    assert find(lookup).boundary_tokens == 8
    found = find(with_tail)
    assert found.boundary_tokens == 12
    assert found.spans[-1].cut_tokens == 12
    assert found.spans[-1].group == STATE
    assert find(with_tail, limit=11).boundary_tokens == 8


@pytest.mark.parametrize("known", [0, 8])
@pytest.mark.parametrize("lacking", ["full", "window"])
def test_tail_that_needs_a_whole_chunk_which_another_group_lacks_is_not_hit(lacking, known):
    others = {"full": hits(0, 1, 2), "window": hits(0, 1, 2), "state": hits(0)} | {lacking: hits(0, 1)}
    lookup = answers(**others)
    (tail,) = CACHES.tail_key(REQUEST.block_hashes, STATE, 12)
    found = find(lambda key: LookupResult.HIT if key == tail else lookup(key), known=known)
    assert found.boundary_tokens == 8


@pytest.mark.parametrize("known", [4, 5])
def test_hit_of_the_device_inside_a_chunk_is_continued_by_a_tail_or_not_at_all(known):
    """All groups kept the first chunk cut at 6; of full attention alone, others left whole chunks."""
    caches = ChunkedCaches(make_config({"full": 1, "window": 1, "state": 1}, tokens_per_hash=2), 1)
    hashes = HashChain(ChainRoot("r", 2), token_ids=list(range(40))).block_hashes
    question, tails = Question(hashes, known, 39), set()
    there = set(caches.keys(hashes, FULL, range(10)))

    def lookup(key):
        return LookupResult.HIT if key in there | tails else LookupResult.MISS

    def hit():
        manager, ctx = AskedManager(lookup), CTX
        presence = HostPresence(caches, question, manager, ctx, takes_retry_as_miss=False)
        return find_hit(caches, question, presence)

    nothing = find(lookup, known=known)
    assert (nothing.num_tokens, nothing.branch_tokens) == (0, None)
    assert find(lookup, known=known + 16).branch_tokens == 16
    assert (hit().num_tokens, hit().spans) == (0, ())
    tails.update(*(caches.tail_key(hashes, group, 6) for group in (FULL, WINDOW, STATE)))
    assert hit().boundary_tokens == 6
    assert chunks(hit()) == ((FULL, 1), (WINDOW, 1), (STATE, 0))


def test_request_branches_where_full_attention_is_held_and_other_layers_are_not():
    assert find(answers(full=hits(*range(7)), window=hits(1), state=hits(0))).branch_tokens == 24
    served = answers(full=hits(*range(6)), window=hits(*range(6)), state=hits(2))
    assert find(served).branch_tokens is None


def test_backend_that_changes_its_mind_within_one_question_is_asked_again():
    asked = []

    def fickle(key):
        asked.append(key)
        return LookupResult.RETRY if asked.count(key) == 1 else LookupResult.MISS

    assert find(fickle) is Deferral.RETRY


def test_tail_without_a_name_is_not_there_and_not_asked_for():
    manager = AskedManager({}.__getitem__)
    question = Question(REQUEST.block_hashes[:2], 0, 8)
    presence = HostPresence(CACHES, question, manager, CTX, takes_retry_as_miss=False)
    assert not presence.has_tail(STATE, 12)
    assert not manager.asked_by


@pytest.mark.parametrize(("letters", "num_found"), [("HHRH", (2, 1)), ("HHHH", (4, 4)), ("MHHH", (0, 3))])
def test_where_retry_is_a_miss_the_chunks_up_to_it_are_found(letters, num_found):
    results = {"H": LookupResult.HIT, "M": LookupResult.MISS, "R": LookupResult.RETRY}
    caches, hashes = ChunkedCaches(make_config({"full": 1}), 1), REQUEST.block_hashes[:4]
    keys = caches.keys(hashes, FULL, range(4))
    known = {key: results[letter] for key, letter in zip(keys, letters, strict=True)}
    manager = AskedManager(known.__getitem__)
    for count, expected in zip(("count_leading", "count_trailing"), num_found, strict=True):
        presence = HostPresence(caches, Question(hashes, 0, 16), manager, CTX, takes_retry_as_miss=True)
        assert getattr(presence, count)(FULL, range(4)) == expected
    assert all(ctx is CTX for ctx in manager.asked_by)


def test_how_far_a_group_reaches_is_asked_once():
    caches, hashes = ChunkedCaches(make_config({"full": 1}), 1), REQUEST.block_hashes[:4]
    manager = AskedManager(lambda key: LookupResult.HIT)
    presence = HostPresence(caches, Question(hashes, 0, 16), manager, CTX, takes_retry_as_miss=False)
    assert [presence.count_leading(FULL, range(count)) for count in (4, 2, 4)] == [4, 2, 4]
    assert len(manager.asked_by) == 4
