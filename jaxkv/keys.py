"""Names of cached content: chained block hashes and the keys chunks are offloaded under.

The chain makes equal hashes mean equal prefixes: a link covers its parent, the tokens of its block and
whatever else changes the cached bytes. Index types live here too, one per index space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NewType

import numpy as np

BlockId = NewType("BlockId", int)
"""A block of one group in the device cache."""
GroupId = NewType("GroupId", int)
"""Position of a group in ``KVCacheConfig.groups``."""
JobId = NewType("JobId", int)
"""One transfer, numbered by the connector's scheduler side."""
BlockHash = NewType("BlockHash", bytes)
"""Hash of a whole prefix that ends with a block."""
OffloadKey = NewType("OffloadKey", bytes)
"""A block hash and the group whose chunk it names, as in vLLM's ``OffloadKey``."""

HASH_NAME = "blake2b-128"
_HASH_BYTES = 16
_GROUP_BYTES = 4


def chain_root(fingerprint: str, salt: str = "") -> BlockHash:
    """The parent of every first block.

    ``fingerprint`` names model, weights revision, cache dtype and layout; ``salt`` separates tenants. Two
    chains with different roots never share a hash.
    """
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in (fingerprint, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return BlockHash(digest.digest())


def hash_block(parent: BlockHash, token_ids: Sequence[int], extra: bytes = b"") -> BlockHash:
    """The hash of one full block that follows ``parent``.

    ``extra`` is whatever else shapes the block's bytes: an adapter's name, digests of multimodal inputs.
    """
    tokens = np.asarray(token_ids, dtype="<i8").tobytes()
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    digest.update(parent)
    digest.update(len(tokens).to_bytes(8, "big"))
    digest.update(tokens)
    digest.update(extra)
    return BlockHash(digest.digest())


def make_offload_key(block_hash: BlockHash, group: GroupId) -> OffloadKey:
    """The key of the chunk of ``group`` that ends where ``block_hash`` ends."""
    return OffloadKey(block_hash + group.to_bytes(_GROUP_BYTES, "big"))


def get_offload_block_hash(key: OffloadKey) -> BlockHash:
    """The block hash inside ``key``."""
    return BlockHash(key[:-_GROUP_BYTES])


def get_offload_group(key: OffloadKey) -> GroupId:
    """The group inside ``key``."""
    return GroupId(int.from_bytes(key[-_GROUP_BYTES:], "big"))
