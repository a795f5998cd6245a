"""The hash chain of a request: one hash for every few tokens, each covering all that stands before it.

Equal hashes mean equal prefixes: a chain starts from what is common to one cache (model, weights, layout,
tenant), goes on with what is the request's own (salt, adapter), and each link covers its parent, its tokens
and the multimodal inputs and embeddings among them. Hashed once, and only forwards.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from jaxkv.errors import ConfigError, RequestError
from jaxkv.key_parts import CacheKeyParts, pack
from jaxkv.keys import BlockHash

HASH_NAME = "blake2b-128"
"""The hash chains use unless told otherwise."""

_HASH_BYTES = {"blake2b-128": 16, "blake2b-256": 32}
_TOKEN_BYTES = 4
_NO_PARTS = CacheKeyParts()

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Token ids as a sequence of ints or an array of integers; they fit in 32 bits."""


@final
@dataclass(frozen=True, slots=True)
class ChainRoot:
    """Where all chains of one cache begin.

    ``fingerprint`` names model, weights revision, cache dtype and layout, see ``cache_fingerprint``; ``salt``
    separates tenants. A link covers ``tokens_per_hash`` tokens and is hashed with ``hash_name``. Chains whose
    roots differ in any of these never share a hash.
    """

    fingerprint: str
    tokens_per_hash: int
    salt: str = ""
    hash_name: str = HASH_NAME

    def __post_init__(self) -> None:
        if self.tokens_per_hash < 1:
            raise ConfigError(f"tokens_per_hash must be at least 1, got {self.tokens_per_hash}")
        if self.hash_name not in _HASH_BYTES:
            raise ConfigError(f"unknown hash {self.hash_name!r}; known are {sorted(_HASH_BYTES)}")

    def first_parent(self, parts: CacheKeyParts = _NO_PARTS) -> BlockHash:
        """The parent of the first link of a request's chain."""
        names = (self.hash_name, self.fingerprint, self.salt, str(self.tokens_per_hash))
        digest = _new_hash(self.hash_name, b"jaxkv root")
        digest.update(pack(*(name.encode() for name in names), parts.request_bytes()))
        return BlockHash(digest.digest())


@final
class HashChain:
    """The hashes of one request, growing with its tokens.

    ``block_hashes`` has one hash for every ``tokens_per_hash`` known tokens. It is the chain's own list,
    appended to and never replaced; others only read it.
    """

    __slots__ = (
        "_empty_link",
        "_first_parent",
        "_loose",
        "_num_links_with_parts",
        "_tokens_per_hash",
        "block_hashes",
        "parts",
    )

    def __init__(self, root: ChainRoot, parts: CacheKeyParts = _NO_PARTS, token_ids: TokenIds = ()) -> None:
        self.parts = parts
        self.block_hashes: list[BlockHash] = []
        self._tokens_per_hash = root.tokens_per_hash
        self._num_links_with_parts = -(-parts.end_token // root.tokens_per_hash)
        self._first_parent = root.first_parent(parts)
        self._empty_link = _new_hash(root.hash_name, b"jaxkv link")
        self._loose = b""
        self.extend(token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens the chain knows, those behind its last hash included."""
        return len(self.block_hashes) * self._tokens_per_hash + len(self._loose) // _TOKEN_BYTES

    def extend(self, token_ids: TokenIds) -> None:
        """Take in further tokens. A long prompt is fastest as an array of int32.

        Raises ``RequestError``, with nothing changed, for what is not a list of 32-bit integers.
        """
        data = self._loose + _token_bytes(token_ids)
        link_bytes = self._tokens_per_hash * _TOKEN_BYTES
        num_links = len(data) // link_bytes
        end = num_links * link_bytes
        self._loose = data[end:]
        if num_links:
            links = memoryview(data)[:end]
            with_parts = min(max(self._num_links_with_parts - len(self.block_hashes), 0), num_links)
            cut = with_parts * link_bytes
            self._link_with_parts(links[:cut])
            self._link(links[cut:])

    def _link(self, data: memoryview) -> None:
        hashes = self.block_hashes
        parent: bytes = hashes[-1] if hashes else self._first_parent
        new_link, append = self._empty_link.copy, hashes.append
        for (tokens,) in struct.iter_unpack(f"{self._tokens_per_hash * _TOKEN_BYTES}s", data):
            link = new_link()
            link.update(parent + tokens)
            parent = link.digest()
            append(BlockHash(parent))

    def _link_with_parts(self, data: memoryview) -> None:
        size = self._tokens_per_hash
        for first in range(0, len(data), size * _TOKEN_BYTES):
            start = len(self.block_hashes) * size
            link = self._empty_link.copy()
            link.update(self.block_hashes[-1] if self.block_hashes else self._first_parent)
            link.update(data[first : first + size * _TOKEN_BYTES])
            link.update(self.parts.block_bytes(range(start, start + size)))
            self.block_hashes.append(BlockHash(link.digest()))


def _new_hash(hash_name: str, person: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_HASH_BYTES[hash_name], person=person)


def _token_bytes(token_ids: TokenIds) -> bytes:
    """Tokens as little-endian int32, all in one go."""
    if isinstance(token_ids, np.ndarray):
        return _array_bytes(token_ids)
    try:
        values = array("i", token_ids)
    except (OverflowError, TypeError) as error:
        raise RequestError(f"token ids must be integers of at most 32 bits: {error}") from error
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _array_bytes(token_ids: npt.NDArray[Any]) -> bytes:
    if token_ids.size == 0:
        return b""
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise RequestError(
            f"token ids must be an array of integers with one axis, got {token_ids.dtype}{token_ids.shape}"
        )
    limits = np.iinfo(np.int32)
    if not limits.min <= token_ids.min() <= token_ids.max() <= limits.max:
        raise RequestError(f"token ids must fit in 32 bits, got {token_ids.min()} to {token_ids.max()}")
    return token_ids.astype("<i4").tobytes()
