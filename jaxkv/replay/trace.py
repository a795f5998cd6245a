"""Traces of serving requests: who asked when, and which parts of the prompts are the same.

A prompt is a sequence of segments instead of tokens. A segment is the beginning of a token stream that its id
names: a system prompt, a document, what a user typed, a reply. So a prompt of 128k tokens is a few numbers,
and its block hashes are derived from those without a token ever being made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxkv.errors import ConfigError
from jaxkv.keys import BlockHash

_HASH_BYTES = 16


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """The first ``num_tokens`` tokens of the stream called ``stream``."""

    stream: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.stream < 0 or self.num_tokens < 1:
            raise ConfigError(
                f"a segment is a stream of at least 0 and at least one token, got {self.stream} and "
                f"{self.num_tokens}"
            )


@final
@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. ``output`` is what it generates, so that a later turn can have it in its prompt."""

    name: str
    arrival_s: float
    prompt: tuple[Segment, ...]
    output: Segment

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError(f"request {self.name!r} has an empty prompt; give it a segment")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(segment.num_tokens for segment in self.prompt)

    @property
    def output_tokens(self) -> int:
        """Tokens that are generated."""
        return self.output.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return self.prompt_tokens + self.output_tokens


def chain_hashes(segments: Sequence[Segment], tokens_per_hash: int, root: BlockHash) -> list[BlockHash]:
    """One hash for each full block of ``tokens_per_hash`` tokens of the segments, as
    ``Request.block_hashes``.

    Two sequences of segments share a hash exactly where they begin with the same tokens up to the end of that
    block, if no two streams have a token in common: what a chain over tokens would give. A block across
    segments is one link of the chain; the whole blocks inside a segment come from one extendable hash of all
    that precedes them, so that 8,192 blocks take a few milliseconds.
    """
    hashes: list[BlockHash] = []
    parent: bytes = root
    open_block, missing = b"", tokens_per_hash
    for segment in segments:
        start = 0
        if open_block:
            start = min(missing, segment.num_tokens)
            open_block += _piece(segment.stream, 0, start)
            missing -= start
            if missing:
                continue
            parent = hashlib.blake2b(parent + open_block, digest_size=_HASH_BYTES).digest()
            hashes.append(BlockHash(parent))
        num_whole, rest = divmod(segment.num_tokens - start, tokens_per_hash)
        if num_whole:
            hashes.extend(_whole_blocks(parent, segment.stream, start, num_whole))
            parent = hashes[-1]
        open_block = _piece(segment.stream, segment.num_tokens - rest, segment.num_tokens) if rest else b""
        missing = tokens_per_hash - rest
    return hashes


def _piece(stream: int, start: int, end: int) -> bytes:
    return b"".join(number.to_bytes(8, "big") for number in (stream, start, end))


def _whole_blocks(parent: bytes, stream: int, start: int, count: int) -> list[BlockHash]:
    """Hashes of ``count`` blocks of one stream; asking for more of them does not change the first ones."""
    seed = parent + stream.to_bytes(8, "big") + start.to_bytes(8, "big")
    digest = hashlib.shake_128(seed).digest(count * _HASH_BYTES)
    return [BlockHash(digest[at : at + _HASH_BYTES]) for at in range(0, len(digest), _HASH_BYTES)]
