"""Requests of the cache machine, and the arrays their tokens are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cache_model import Contents, Layer, Question


@dataclass(frozen=True)
class Wishes:
    """What a request asks of the connector."""

    max_load_tokens: int | None = None
    max_offload_tokens: int | None = None
    offload_policy: str = "chunk_level"
    skip_reading: bool = False

    @property
    def params(self) -> dict[str, object]:
        """As ``kv_transfer_params``."""
        return {
            "max_load_tokens": self.max_load_tokens,
            "max_offload_tokens": self.max_offload_tokens,
            "offload_policy": self.offload_policy,
        }


class MachineRequest:
    """A request whose tokens, generated ones included, are known beforehand; see ``protocols.Request``.

    ``store_limit`` is how many of its tokens may be stored. ``has_run`` says that it made a step since it was
    admitted, ``volatile`` that what draft layers hold for the last computed token is still to be rewritten.
    """

    __slots__ = (
        "_all_hashes",
        "_hash_tokens",
        "block_hashes",
        "contents",
        "has_ended",
        "has_run",
        "kv_transfer_params",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "request_id",
        "skip_reading_prefix_cache",
        "store_limit",
        "volatile",
        "wishes",
    )

    def __init__(
        self,
        request_id: str,
        contents: Contents,
        num_prompt_tokens: int,
        links: tuple[int, int],
        wishes: Wishes,
    ) -> None:
        self.request_id = request_id
        self.contents = contents
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = num_prompt_tokens
        self.num_computed_tokens = 0
        self.store_limit = len(contents.ids)
        self.wishes = wishes
        self.kv_transfer_params = wishes.params
        self.skip_reading_prefix_cache = wishes.skip_reading
        self.volatile = False
        self.has_run = False
        self.has_ended = False
        self._hash_tokens, hash_bytes = links
        self._all_hashes = [
            prefix.to_bytes(hash_bytes, "big")
            for prefix in contents.ids[self._hash_tokens - 1 :: self._hash_tokens].tolist()
        ]
        self.block_hashes = self._all_hashes[: num_prompt_tokens // self._hash_tokens]

    def __repr__(self) -> str:
        return (
            f"{self.request_id} ({self.num_computed_tokens} of {self.num_tokens} tokens computed, "
            f"prompt {self.num_prompt_tokens}, ends at {self.max_tokens})"
        )

    @property
    def max_tokens(self) -> int:
        """Tokens at which the request ends; the last of them is never computed."""
        return len(self.contents.ids)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are known."""
        return self.num_tokens == self.max_tokens

    def generate(self, num_tokens: int) -> None:
        """Tokens became known."""
        self.num_tokens += num_tokens
        known = self.num_tokens // self._hash_tokens
        self.block_hashes.extend(self._all_hashes[len(self.block_hashes) : known])

    def question(self, known: int) -> Question:
        """How far the request may be served behind a device hit of ``known`` tokens."""
        num_hashed = len(self.block_hashes) * self._hash_tokens
        limit = min(self.num_tokens - 1, num_hashed)
        if self.wishes.max_load_tokens is not None:
            limit = min(limit, known + self.wishes.max_load_tokens)
        if self.wishes.skip_reading:
            limit = min(limit, known)
        return Question(self.contents.ids, known, limit, num_hashed)


@dataclass(slots=True)
class Part:
    """One request's part of a step: tokens ``[start, end)`` are computed, those from ``kept`` on rejected.

    ``samples`` says that a new token follows. ``emitted`` are states left in further blocks on the way, as
    ``(group, block, boundary)``.
    """

    request: MachineRequest
    start: int
    end: int
    kept: int
    samples: bool
    emitted: list[tuple[int, int, int]] = field(default_factory=list)


class Caches:
    """The cache arrays of every shard, and the computation of a step in them.

    ``arrays[shard][group]`` are (num_blocks, values of a block). Before a token is computed, all it reads of
    what came before is compared with the model.
    """

    def __init__(self, layers: Sequence[Layer], num_blocks: Sequence[int], num_shards: int, max_tokens: int):
        self._layers = tuple(layers)
        self._num_rejected = 0
        widths = [2 if layer.kind == "state" else layer.block for layer in layers]
        self.arrays = [
            [np.full((count, width), -1, np.int64) for count, width in zip(num_blocks, widths, strict=True)]
            for _ in range(num_shards)
        ]
        self._flat = [[array.reshape(-1) for array in shard] for shard in self.arrays]
        positions = np.arange(max_tokens)
        self._block_of = [positions // layer.block for layer in layers]
        self._offset_in = [positions % layer.block for layer in layers]

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy one block on the device."""
        for shard in self.arrays:
            shard[group][target] = shard[group][source]

    def check(self, part: Part, group: int, row: np.ndarray) -> None:
        """Compare what the first token of ``part`` reads with what the model says."""
        layer, request = self._layers[group], part.request
        wanted = request.contents.tokens[group]
        if layer.kind == "state":
            self._check_state(part, group, row)
            return
        end = part.start - (layer.draft and request.volatile)
        first = layer.first_read(part.start)
        if layer.sinks:
            self._compare(group, row, 0, min(layer.sinks, first, end), wanted, part)
        self._compare(group, row, first, end, wanted, part)

    def _compare(
        self, group: int, row: np.ndarray, first: int, end: int, wanted: np.ndarray, part: Part
    ) -> None:
        if first >= end:
            return
        places = self._places(group, row, first, end)
        for shard, flat in enumerate(self._flat):
            found = flat[group][places]
            if not np.array_equal(found, wanted[first:end] + shard if shard else wanted[first:end]):
                self._fail(part, group, first, found - shard, wanted[first:end], row)

    def _check_state(self, part: Part, group: int, row: np.ndarray) -> None:
        if not part.start:
            return
        block = int(row[(part.start - 1) // self._layers[group].block])
        wanted = int(part.request.contents.tokens[group][part.start - 1])
        for shard, arrays in enumerate(self.arrays):
            found = arrays[group][block].tolist()
            if block < 0 or found != [wanted + shard, part.start + shard]:
                self._fail(part, group, part.start, np.array(found), np.array([wanted, part.start]), row)

    def _fail(self, part: Part, group: int, first: int, found, wanted, row) -> None:
        wrong = np.flatnonzero(found != wanted)
        raise AssertionError(
            f"{part.request} computes token {part.start}, and group {group} ({self._layers[group]}) has "
            f"wrong values for tokens {(wrong + first).tolist()}:\n{found[wrong]} instead of\n"
            f"{wanted[wrong]}\ntable: {row[row >= 0]}"
        )

    def write(self, part: Part, group: int, row: np.ndarray) -> None:
        """Leave in the caches what the tokens of ``part`` leave; rejected ones leave rubbish."""
        layer, request = self._layers[group], part.request
        values = request.contents.tokens[group]
        if layer.kind == "state":
            block = int(row[(part.kept - 1) // layer.block])
            assert block >= 0, f"{request} has no block for the state at {part.kept}"
            for shard, arrays in enumerate(self.arrays):
                arrays[group][block] = int(values[part.kept - 1]) + shard, part.kept + shard
            return
        start = part.start
        if layer.draft and request.volatile and row[(start - 1) // layer.block] >= 0:
            start -= 1
        places = self._places(group, row, start, part.end)
        # What a draft layer leaves for the last known token may be rewritten, as if it had been rejected.
        kept = part.kept - (layer.draft and part.samples)
        written = values[start:kept]
        if kept < part.end:
            self._num_rejected += part.end - kept
            written = np.append(written, np.arange(kept - part.end, 0) - self._num_rejected)
        for shard, flat in enumerate(self._flat):
            flat[group][places] = written + shard if shard else written

    def emit(self, part: Part) -> None:
        """Leave the states that ``part`` comes by in blocks of their own."""
        for group, block, boundary in part.emitted:
            state = int(part.request.contents.tokens[group][boundary - 1])
            for shard, arrays in enumerate(self.arrays):
                arrays[group][block] = state + shard, boundary + shard

    def _places(self, group: int, row: np.ndarray, first: int, end: int) -> np.ndarray:
        blocks = row[self._block_of[group][first:end]]
        assert blocks.min() >= 0, (
            f"tokens {first} to {end} of group {group} lie in blocks that are not held: {row}"
        )
        return blocks * self._layers[group].block + self._offset_in[group][first:end]
