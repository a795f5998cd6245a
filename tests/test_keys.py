"""Keys give back what they were made of."""

from hypothesis import given
from hypothesis import strategies as st

from jaxkv.keys import (
    BlockHash,
    GroupId,
    get_offload_block_hash,
    get_offload_group,
    make_offload_key,
)

HASHES = st.binary(min_size=16, max_size=16) | st.binary(min_size=32, max_size=32)


@given(HASHES, st.integers(0, 2**32 - 1))
def test_key_gives_back_its_hash_and_group(block_hash, group):
    key = make_offload_key(BlockHash(block_hash), GroupId(group))
    assert get_offload_block_hash(key) == block_hash
    assert get_offload_group(key) == group


def test_one_hash_in_two_groups_gives_two_keys():
    block_hash = BlockHash(b"0" * 16)
    assert make_offload_key(block_hash, GroupId(0)) != make_offload_key(block_hash, GroupId(1))
