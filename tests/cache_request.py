"""Requests of the cache machine, and the arrays their tokens are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cache_model import Contents, Layer


class MachineRequest:
    """A request whose tokens, generated ones included, are known beforehand; see ``protocols.Request``.

    ``volatile`` says that what its draft layers hold for the last computed token is still to be rewritten.
    """

    __slots__ = (
        "_all_hashes",
        "_hash_tokens",
        "block_hashes",
        "contents",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "request_id",
        "volatile",
    )

    def __init__(
        self, request_id: str, contents: Contents, num_prompt_tokens: int, hash_tokens: int, hash_bytes: int
    ) -> None:
        self.request_id = request_id
        self.contents = contents
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = num_prompt_tokens
        self.num_computed_tokens = 0
        self.volatile = False
        self._hash_tokens = hash_tokens
        self._all_hashes = [
            prefix.to_bytes(hash_bytes, "big")
            for prefix in contents.ids[hash_tokens - 1 :: hash_tokens].tolist()
        ]
        self.block_hashes = self._all_hashes[: num_prompt_tokens // hash_tokens]

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


@dataclass(slots=True)
class Part:
    """One request's part of a step: tokens ``[start, end)`` are computed, those from ``kept`` on rejected."""

    request: MachineRequest
    start: int
    end: int
    kept: int


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
        start = part.start - (layer.draft and request.volatile)
        places = self._places(group, row, start, part.end)
        written = values[start : part.kept]
        num_rejected = part.end - part.kept
        if num_rejected:
            self._num_rejected += num_rejected
            written = np.append(written, np.arange(-self._num_rejected, num_rejected - self._num_rejected))
        for shard, flat in enumerate(self._flat):
            flat[group][places] = written + shard if shard else written

    def _places(self, group: int, row: np.ndarray, first: int, end: int) -> np.ndarray:
        blocks = row[self._block_of[group][first:end]]
        assert blocks.min() >= 0, (
            f"tokens {first} to {end} of group {group} lie in blocks that are not held: {row}"
        )
        return blocks * self._layers[group].block + self._offset_in[group][first:end]
