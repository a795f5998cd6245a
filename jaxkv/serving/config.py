"""The options of the loop, checked where they are made, and its counters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

from jaxkv.errors import ConfigError
from jaxkv.hash_chain import HASH_NAME
from jaxkv.serving.sizing import DEFAULT_PREFILL_SHAPES


@final
@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of the loop.

    ``max_num_seqs`` requests hold blocks at once. ``max_model_len`` caps prompt plus new tokens and fixes the
    table width; ``None`` takes the model's. ``prefill_shapes`` are the token counts prefill is compiled for.
    ``prefill_budget`` caps prompt tokens of one step; ``None`` takes the largest shape. Keys of what is
    cached differ with ``weights_revision``, which tells weights from others of the same model, and with
    ``salt``, which separates tenants; ``hash_name`` is ``"blake2b-128"`` or ``"blake2b-256"``.
    """

    max_num_seqs: int = 8
    max_model_len: int | None = None
    prefill_shapes: tuple[int, ...] = DEFAULT_PREFILL_SHAPES
    prefill_budget: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weights_revision: str = ""
    salt: str = ""
    hash_name: str = HASH_NAME

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        shapes = self.prefill_shapes
        if not shapes or shapes[0] < 2 or any(a >= b for a, b in itertools.pairwise(shapes)):
            raise ConfigError(f"prefill_shapes must ascend and be at least 2, got {shapes}")
        if self.prefill_budget is not None and self.prefill_budget < shapes[0]:
            raise ConfigError(
                f"prefill_budget is {self.prefill_budget}, less than the smallest prefill shape {shapes[0]}"
            )

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Row counts decode is compiled for: powers of two, and the largest batch."""
        powers = itertools.takewhile(lambda rows: rows < self.max_num_seqs, (2**i for i in itertools.count()))
        return (*powers, self.max_num_seqs)


@final
@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made."""

    num_steps: int
    num_compilations: int
    num_preemptions: int
    device_evictions: int
