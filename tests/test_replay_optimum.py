"""The offline optimum against every possible way to run a pool."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.keys import BlockHash
from jaxkv.replay.models import MODEL_SHAPES
from jaxkv.replay.optimum import HostAccesses, capacity_in_pieces
from jaxkv.serving.sizing import divide_device_bytes
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec

GIB = 1 << 30
MODELS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True),
        st.integers(0, 2),
        st.integers(0, 4),
    ),
    max_size=6,
)


def most_hits(requests: list[tuple[list[int], range]], capacity: int) -> int:
    """Try everything: after each request the pool may hold any of what it held or the device has."""
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for pieces, wanted in requests:
        needed = {pieces[index] for index in wanted if index < len(pieces)}
        following: dict[frozenset[int], int] = {}
        for held, hits in reached.items():
            offered = held | set(pieces)
            for size in range(min(capacity, len(offered)) + 1):
                for kept in map(frozenset, combinations(sorted(offered), size)):
                    following[kept] = max(following.get(kept, 0), hits + len(held & needed))
        reached = following
    return max(reached.values())


def accesses_of(requests: list[tuple[list[int], range]]) -> HostAccesses:
    accesses = HostAccesses()
    for pieces, wanted in requests:
        accesses.add([BlockHash(bytes([piece])) for piece in pieces], wanted)
    return accesses


@settings(max_examples=150)
@given(MODELS, st.integers(0, 3))
def test_optimum_is_the_best_of_all_ways_to_run_the_pool(shapes, capacity):
    requests = [(pieces, range(start, stop)) for pieces, start, stop in shapes]
    assert accesses_of(requests).optimal_hits(capacity) == most_hits(requests, capacity)


def test_a_pool_without_limit_supplies_whatever_was_seen_before():
    requests = [([0, 1, 2], range(3)), ([0, 1, 3], range(3)), ([0, 1, 2], range(1, 3))]
    assert accesses_of(requests).optimal_hits(None) == 4
    assert accesses_of(requests).optimal_hits(3) == 4
    assert accesses_of(requests).optimal_hits(2) == 3


def test_what_is_on_the_device_again_before_it_is_needed_takes_no_room():
    """Piece 0 is found on the device by the second request, so only from there on it must be kept."""
    requests = [([0, 1], range(2)), ([0], range(0)), ([1], range(1)), ([0], range(1))]
    assert accesses_of(requests).optimal_hits(1) == 1
    assert accesses_of([requests[0], requests[2], requests[1], requests[3]]).optimal_hits(1) == 2


def test_capacity_counts_the_layers_that_read_the_whole_prefix():
    gemma = divide_device_bytes(MODEL_SHAPES["gemma-like"].make_groups(16), 24 * GIB, 1000)
    assert capacity_in_pieces(gemma, GIB) == 1024
    assert capacity_in_pieces(gemma, GIB - 1) == 1023
    bamba = divide_device_bytes(MODEL_SHAPES["bamba-like"].make_groups(16), 24 * GIB, 1000)
    assert capacity_in_pieces(bamba, 3 * 65536 * 7) == 7


def test_a_model_without_such_layers_has_no_capacity_to_count():
    state = MambaSpec(16, shapes=((4,),), dtypes=("float32",))
    assert capacity_in_pieces(KVCacheConfig((KVCacheGroupSpec(("a",), state, 4),)), GIB) is None
