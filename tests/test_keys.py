"""Equal keys mean equal prefixes of the same model, tenant and group."""

from hypothesis import given
from hypothesis import strategies as st

from jaxkv.keys import (
    BlockHash,
    GroupId,
    chain_root,
    get_offload_block_hash,
    get_offload_group,
    hash_block,
    make_offload_key,
)

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
BLOCKS = st.lists(st.tuples(TOKENS, st.binary(max_size=3)), max_size=4)


def chain(blocks, fingerprint="model", salt=""):
    parent = chain_root(fingerprint, salt)
    for tokens, extra in blocks:
        parent = hash_block(parent, tokens, extra)
    return parent


@given(BLOCKS, BLOCKS)
def test_hashes_are_equal_exactly_when_the_whole_prefixes_are(first, second):
    assert (chain(first) == chain(second)) == (first == second)


@given(TOKENS, TOKENS, TOKENS)
def test_same_block_after_different_parents_hashes_differently(first, second, block):
    same = hash_block(chain([(first, b"")]), block) == hash_block(chain([(second, b"")]), block)
    assert same == (first == second)


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_roots_are_equal_exactly_when_fingerprint_and_salt_are(fingerprint, salt, fingerprint2, salt2):
    same = chain_root(fingerprint, salt) == chain_root(fingerprint2, salt2)
    assert same == ((fingerprint, salt) == (fingerprint2, salt2))


def test_moving_a_letter_from_fingerprint_to_salt_changes_the_root():
    assert chain_root("ab", "c") != chain_root("a", "bc")


def test_moving_a_token_into_the_extra_bytes_changes_the_hash():
    root = chain_root("model")
    assert hash_block(root, [1, 2]) != hash_block(root, [1], (2).to_bytes(8, "little"))


def test_block_boundaries_are_part_of_the_chain():
    assert chain([([1, 2], b""), ([3], b"")]) != chain([([1], b""), ([2, 3], b"")])


def test_chain_is_the_same_in_every_process():
    # Keys outlive the process in shared and persistent tiers, so the value itself is part of the contract.
    assert chain([([1, 2, 3], b"lora")], "model", "tenant").hex() == "097981dd902ebfdca81ceb33c9917a08"


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1))
def test_key_gives_back_its_hash_and_group(block_hash, group):
    key = make_offload_key(BlockHash(block_hash), GroupId(group))
    assert get_offload_block_hash(key) == block_hash
    assert get_offload_group(key) == group


def test_one_hash_in_two_groups_gives_two_keys():
    block_hash = chain([([1], b"")])
    assert make_offload_key(block_hash, GroupId(0)) != make_offload_key(block_hash, GroupId(1))
