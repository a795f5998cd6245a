"""What shapes the cached bytes of a request beside its tokens: salt, adapter, multimodal inputs, embeddings.

Values, and their bytes as hashes cover them. Every part is tagged and says how long it is, so that two
different requests never come out as the same bytes.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar, final

import numpy as np

from jaxkv.errors import RequestError

ExtraKey = tuple[str | int, ...]
"""One part of a key as events tell it, such as ``("mm", digest, offset)``; JSON writes it as it is."""

_DIGEST_BYTES = 16
_END = attrgetter("end_token")


@final
@dataclass(frozen=True, slots=True)
class MultiModalInput:
    """An image, audio or video whose embeddings stand at tokens ``[first_token, first_token + num_tokens)``.

    ``digest`` names its content and how it was processed, as vLLM's ``mm_hash``; the placeholder tokens
    themselves say nothing of either.
    """

    digest: str
    first_token: int
    num_tokens: int
    packed: bytes = field(init=False, repr=False, compare=False)
    """What hashes cover of it, but for where it stands."""

    def __post_init__(self) -> None:
        _require_text("digest", self.digest)
        _require_span(self, self.first_token, self.num_tokens)
        object.__setattr__(self, "packed", b"M" + pack(self.digest.encode(), pack_int(self.num_tokens)))

    @property
    def end_token(self) -> int:
        """The token behind the last one."""
        return self.first_token + self.num_tokens


@final
@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """Embeddings given instead of tokens, from ``first_token`` on: one digest for the row of each token."""

    first_token: int
    row_digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _require_span(self, self.first_token, len(self.row_digests))
        if not all(isinstance(digest, bytes) and digest for digest in self.row_digests):
            raise RequestError("digests of embeddings must be bytes, one for each token; use of_rows")

    @classmethod
    def of_rows(cls, rows: Any, first_token: int = 0) -> PromptEmbeddings:
        """Those of ``rows``, an array (num_tokens, hidden_size) of any dtype."""
        array = np.ascontiguousarray(rows)
        if array.ndim != 2:
            raise RequestError(f"embeddings must be an array of (tokens, hidden), got shape {array.shape}")
        kind = pack(array.dtype.name.encode(), str(array.shape[1]).encode())
        start = hashlib.blake2b(kind, digest_size=_DIGEST_BYTES, person=b"jaxkv embeds")
        digests = []
        for row in array.view(np.uint8).reshape(len(array), -1):
            digest = start.copy()
            digest.update(row.data)
            digests.append(digest.digest())
        return cls(first_token, tuple(digests))

    @property
    def end_token(self) -> int:
        """The token behind the last one."""
        return self.first_token + len(self.row_digests)


_Part = TypeVar("_Part", MultiModalInput, PromptEmbeddings)


@final
@dataclass(frozen=True, slots=True)
class CacheKeyParts:
    """What two requests must have in common to share a cached prefix, beside its tokens.

    ``cache_salt``: only requests with the same salt share anything (vLLM: ``cache_salt``).
    ``lora_name``, ``lora_revision``: the adapter, and what tells it from an earlier one of that name: a
    version, a path, a digest.
    ``inputs``, ``embeddings``: in token order, without overlap; they count from the first block they touch.
    """

    cache_salt: str | None = None
    lora_name: str | None = None
    lora_revision: str = ""
    inputs: tuple[MultiModalInput, ...] = ()
    embeddings: tuple[PromptEmbeddings, ...] = ()

    def __post_init__(self) -> None:
        for name in ("cache_salt", "lora_name"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        if self.lora_revision and self.lora_name is None:
            raise RequestError(
                f"lora_revision is {self.lora_revision!r} without an adapter; set lora_name too"
            )
        _require_order("inputs", self.inputs, MultiModalInput)
        _require_order("embeddings", self.embeddings, PromptEmbeddings)

    @property
    def end_token(self) -> int:
        """The token from which on nothing but tokens tells requests apart."""
        inputs_end = self.inputs[-1].end_token if self.inputs else 0
        embeddings_end = self.embeddings[-1].end_token if self.embeddings else 0
        return max(inputs_end, embeddings_end)

    def request_bytes(self) -> bytes:
        """What counts from the first token on; empty where that is nothing."""
        if self.cache_salt is None and self.lora_name is None:
            return b""
        lora = (
            pack() if self.lora_name is None else pack(self.lora_name.encode(), self.lora_revision.encode())
        )
        salt = pack() if self.cache_salt is None else pack(self.cache_salt.encode())
        return pack(salt, lora)

    def block_bytes(self, tokens: range) -> bytes:
        """What counts from the block of ``tokens`` on, because it begins or goes on in it; often empty."""
        parts = [
            part.packed + pack_int(part.first_token - tokens.start) for part in _within(self.inputs, tokens)
        ]
        parts += [b"E" + pack(pack_int(offset), *rows) for offset, rows in self._rows_within(tokens)]
        return b"".join(parts)

    def extra_keys(self, tokens: range) -> tuple[ExtraKey, ...]:
        """The parts of the chunk of ``tokens`` as events tell them."""
        keys: list[ExtraKey] = []
        if self.lora_name is not None:
            keys.append(("lora", self.lora_name, self.lora_revision))
        keys += [
            ("mm", part.digest, part.first_token - tokens.start) for part in _within(self.inputs, tokens)
        ]
        if self.cache_salt is not None and tokens.start == 0:
            keys.append(("cache_salt", self.cache_salt))
        for offset, rows in self._rows_within(tokens):
            keys.append(("prompt_embeds", offset, *(row.hex() for row in rows)))
        return tuple(keys)

    def _rows_within(self, tokens: range) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """Digests of the rows in ``tokens``, and how far from its start each stretch of them begins."""
        for part in _within(self.embeddings, tokens):
            first = max(part.first_token, tokens.start)
            rows = part.row_digests[first - part.first_token : tokens.stop - part.first_token]
            yield first - tokens.start, rows


def pack(*fields: bytes) -> bytes:
    """``fields`` as bytes that no other fields give."""
    return b"".join((pack_int(len(fields)), *(pack_int(len(field)) + field for field in fields)))


def pack_int(value: int) -> bytes:
    """A number as 8 bytes."""
    return value.to_bytes(8, "big", signed=True)


def _within(parts: Sequence[_Part], tokens: range) -> Sequence[_Part]:
    first = last = bisect_right(parts, tokens.start, key=_END)
    while last < len(parts) and parts[last].first_token < tokens.stop:
        last += 1
    return parts[first:last]


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be a text that is not empty, got {value!r}")


def _require_span(part: object, first_token: int, num_tokens: int) -> None:
    if first_token < 0 or num_tokens < 1:
        raise RequestError(
            f"a {type(part).__name__} must cover at least one token from token 0 on, got {num_tokens} tokens "
            f"from {first_token} on"
        )


def _require_order(name: str, parts: tuple[Any, ...], kind: type) -> None:
    if not isinstance(parts, tuple) or not all(isinstance(part, kind) for part in parts):
        raise RequestError(f"{name} must be a tuple of {kind.__name__}, got {parts!r}")
    for part, following in pairwise(parts):
        if part.end_token > following.first_token:
            raise RequestError(
                f"{name} must be in token order and not overlap, but one ends at token {part.end_token} and "
                f"the next begins at {following.first_token}"
            )
