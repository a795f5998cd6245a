"""Block pool, chunk shapes and requests on their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ToyModel, make_config

from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.keys import BlockHash
from jaxkv.serving import EngineConfig, Request, SamplingParams
from jaxkv.serving.block_pool import BlockPool
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk, ChunkRules, chunk_choices, pick_shape
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec


def name(text):
    return BlockHash(text.encode())


def test_freed_cached_blocks_stay_findable_until_the_least_recent_is_reused():
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, name("first"))
    pool.register(second, name("second"))
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 2
    assert pool.find(name("first")) == first
    assert pool.allocate() == first
    assert pool.find(name("first")) is None
    assert pool.find(name("second")) == second
    assert pool.num_evictions == 1


def test_a_hit_makes_a_block_recent_again():
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, name("first"))
    pool.register(second, name("second"))
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    assert pool.allocate() == second


def test_blocks_that_hold_nothing_are_handed_out_before_cached_ones():
    pool = BlockPool(2)
    cached, blank = pool.allocate(), pool.allocate()
    pool.register(cached, name("cached"))
    pool.release(cached)
    pool.release(blank)
    assert pool.allocate() == blank
    assert pool.num_evictions == 0


def test_a_shared_block_is_free_only_when_its_last_user_released_it():
    pool = BlockPool(1)
    block = pool.allocate()
    pool.register(block, name("shared"))
    pool.acquire(block)
    pool.release(block)
    assert not pool.is_free(block)
    pool.release(block)
    assert pool.is_free(block)


def test_the_same_prefix_is_cached_once():
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, name("same"))
    pool.register(second, name("same"))
    assert pool.find(name("same")) == first
    assert pool.num_cached == 1


@pytest.mark.parametrize(
    ("remaining", "shape"),
    [
        (1, 32),
        (31, 32),
        (33, 32),
        (96, 32),
        (97, 128),
        (128, 128),
        (300, 128),
        (384, 128),
        (385, 512),
        (9999, 512),
    ],
)
def test_a_shape_is_rounded_up_only_if_under_a_quarter_is_wasted(remaining, shape):
    assert pick_shape(remaining, (32, 128, 512)) == shape


@given(
    num_tokens=st.integers(1, 2000),
    budget=st.integers(32, 600),
    block_size=st.sampled_from([4, 16, 24, 48, 64]),
    stop=st.booleans(),
)
def test_chunks_cover_a_prompt_and_stop_where_a_state_can_be_reused(num_tokens, budget, block_size, stop):
    rules = ChunkRules((32, 128, 512), block_size, block_size, stop_at_blocks=stop)
    position, ends = 0, []
    while position < num_tokens:
        chunk = next(iter(chunk_choices(rules, position, num_tokens, budget)))
        assert chunk.start == position
        assert 0 < chunk.num_new <= chunk.shape <= max(budget, 1)
        position = chunk.end
        ends.append(position)
    assert position == num_tokens
    last_boundary = (num_tokens - 1) // block_size * block_size
    if stop and last_boundary:
        assert last_boundary in ends
        for start, end in zip([0, *ends], ends, strict=False):
            if end <= last_boundary and start // block_size != end // block_size:
                assert end % block_size == 0


def test_smaller_choices_follow_the_best_one_down_to_one_block():
    rules = ChunkRules((32, 128), 16, 16, stop_at_blocks=False)
    choices = [(chunk.shape, chunk.end) for chunk in chunk_choices(rules, 5, 300, 512)]
    assert choices == [(128, 133), (32, 37), (32, 16)]


def test_without_budget_only_a_decode_goes_on():
    rules = ChunkRules((32, 128), 16, 16, stop_at_blocks=False)
    assert list(chunk_choices(rules, 0, 100, 31)) == []
    assert [chunk.shape for chunk in chunk_choices(rules, 99, 100, 0)] == [1]


def test_a_state_is_cached_only_when_a_step_ended_on_its_block_boundary():
    model = ToyModel(kinds=("state",))
    cache = CacheManager(make_config(model, 4, state=4), 32)
    request = Request("r", range(12), SamplingParams(), chain=HashChain(ChainRoot("", 4)), arrival_s=0.0)
    first, second = Chunk(0, 6, 8), Chunk(6, 8, 8)
    assert cache.admit(request, 0, 0, first)
    cache.register(request, first.end)
    assert cache.pools[0].num_cached == 0  # entry 0 was skipped, entry 1 holds the state in mid-block
    assert cache.extend(request, Chunk(6, 11, 8))
    cache.register(request, 11)
    assert cache.pools[0].num_cached == 0  # entry 1 still holds the state after 6 tokens, not after 8
    cache.release(request)
    assert cache.admit(request, 0, 0, first)
    assert cache.extend(request, second)
    cache.register(request, second.end)
    assert cache.find_hit(request) == 8


def test_hashes_chain_from_the_root_and_grow_with_the_tokens():
    root = ChainRoot("model", 2)
    request = Request("r", [1, 2, 3, 4, 5], SamplingParams(), chain=HashChain(root), arrival_s=0.0)
    hashes = request.block_hashes
    assert hashes == HashChain(root, token_ids=[1, 2, 3, 4]).block_hashes
    request.append_token(6, 0.0)
    assert hashes == HashChain(root, token_ids=[1, 2, 3, 4, 5, 6]).block_hashes


@pytest.mark.parametrize(("seqs", "rows"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_decode_is_compiled_for_powers_of_two_and_the_largest_batch(seqs, rows):
    assert EngineConfig(max_num_seqs=seqs).decode_rows == rows


def test_a_state_block_reserved_for_a_later_step_is_told_of_where_it_is_used():
    """Loaded to 13 tokens, with a block reserved for 13 to 24; then 13 to 14 and 14 to 18 are computed."""
    state = MambaSpec(3, ((2,),), (np.uint32,))
    cache = CacheManager(KVCacheConfig((KVCacheGroupSpec(("s",), state, 8),), tokens_per_hash=1), 60)
    chain = HashChain(ChainRoot("m", 1))
    request = Request("r", list(range(24)), SamplingParams(), chain=chain, arrival_s=0.0)
    assert cache.admit(request, 0, 13, Chunk(13, 24, 16))
    cache.all_tables(request)
    (table,) = cache.loaded_tables(request, 13)
    for chunk in (Chunk(13, 14, 1), Chunk(14, 18, 16)):
        assert cache.extend(request, chunk)
        table += (cache.new_tables(request) or [[]])[0]
        written = int(cache.row(request, 0)[(chunk.end - 1) // 3])
        assert table[(chunk.end - 1) // 3] == written
        assert len(table) == -(-chunk.end // 3)
