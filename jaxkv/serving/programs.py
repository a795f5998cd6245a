"""The compiled step programs: one for each number of rows and tokens, donating the caches.

Programs are compiled ahead of time and called by shape, so a step either finds its program or compiles one
that is then counted; nothing recompiles unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import jax
import numpy as np

from jaxkv.serving.model import KVCaches, Model, StepBatch
from jaxkv.serving.sampling import SamplingBatch, sample


@final
@dataclass(frozen=True, slots=True)
class StepShape:
    """``rows`` requests of up to ``tokens`` new tokens; without ``samples`` only the caches are updated."""

    rows: int
    tokens: int
    samples: bool


@final
class StepPrograms:
    """Runs a model's step. ``num_compilations`` counts the programs compiled so far."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._compiled: dict[StepShape, Any] = {}

    def __contains__(self, shape: StepShape) -> bool:
        """Whether the program of ``shape`` is compiled."""
        return shape in self._compiled

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._compiled)

    def compile(
        self, shape: StepShape, kv_caches: KVCaches, batch: StepBatch, sampling: SamplingBatch
    ) -> None:
        """Compile the program of ``shape``. Reads shapes only; the caches stay usable."""
        if shape.samples:
            step = jax.jit(self._sampling_step, donate_argnums=1)
            lowered = step.lower(self._model.params, kv_caches, batch, sampling)
        else:
            lowered = jax.jit(self._cache_step, donate_argnums=1).lower(self._model.params, kv_caches, batch)
        self._compiled[shape] = lowered.compile()

    def fill(self, shape: StepShape, kv_caches: KVCaches, batch: StepBatch) -> KVCaches:
        """Compute a chunk whose logits nobody wants. Consumes ``kv_caches``."""
        caches: KVCaches = self._compiled[shape](self._model.params, kv_caches, batch)
        return caches

    def run(
        self, shape: StepShape, kv_caches: KVCaches, batch: StepBatch, sampling: SamplingBatch
    ) -> tuple[jax.Array, jax.Array, KVCaches]:
        """Next tokens (B,) int32, logits (B, V) float32 and the caches. Consumes ``kv_caches``."""
        tokens, logits, caches = self._compiled[shape](self._model.params, kv_caches, batch, sampling)
        return tokens, logits, caches

    def _sampling_step(
        self, params: Any, kv_caches: KVCaches, batch: StepBatch, sampling: SamplingBatch
    ) -> tuple[jax.Array, jax.Array, KVCaches]:
        logits, caches = self._model.step(params, kv_caches, batch)
        return sample(logits.astype(np.float32), sampling), logits, caches

    def _cache_step(self, params: Any, kv_caches: KVCaches, batch: StepBatch) -> KVCaches:
        # The logits are not an output, so XLA drops the unembedding, which is most of a short chunk's work.
        return self._model.step(params, kv_caches, batch)[1]
