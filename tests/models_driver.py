"""Runs a model without a serving loop: own block tables, prefill in fixed shapes, greedy decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxkv.serving.model import Model, StepBatch
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec

DATA = Path(__file__).parent / "data"
BLOCK_SIZE = 16
PREFILL_SHAPES = (32, 128, 512)


def read_cases(path: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    return cases


@dataclass
class Request:
    """One row: its block table (attention), its two state blocks (recurrent), its progress."""

    table: np.ndarray
    state_blocks: tuple[int, int]
    num_computed: int = 0


@dataclass
class Runner:
    """Caches of one model, and requests with blocks in shuffled order that never overlap."""

    model: Model
    num_requests: int = 2
    max_tokens: int = 256
    caches: Any = field(init=False)

    def __post_init__(self) -> None:
        self.specs = [spec for _, spec in self.model.cache_groups(BLOCK_SIZE, jnp.float32)]
        blocks_each = self.max_tokens // BLOCK_SIZE
        num_blocks = self.num_requests * blocks_each
        self.config = KVCacheConfig(
            tuple(
                KVCacheGroupSpec(names, spec, 2 * self.num_requests if is_state(spec) else num_blocks)
                for names, spec in self.model.cache_groups(BLOCK_SIZE, jnp.float32)
            )
        )
        self.caches = self.model.init_caches(self.config)
        self._step = jitted_step(self.model)
        shuffled = np.random.default_rng(0).permutation(num_blocks).reshape(self.num_requests, -1)
        self.requests = [Request(row, (2 * i, 2 * i + 1)) for i, row in enumerate(shuffled)]

    def batch(self, rows: Sequence[tuple[Request | None, Sequence[int]]], width: int) -> StepBatch:
        """The step in which each request gets its tokens; ``None`` is a padding row."""
        token_ids = np.full((len(rows), width), 7, np.int32)  # padding that would show if it were read
        tables: list[np.ndarray] = []
        for spec in self.specs:
            columns = 2 if is_state(spec) else self.max_tokens // BLOCK_SIZE
            tables.append(np.full((len(rows), columns), -1, np.int32))
        for i, (request, tokens) in enumerate(rows):
            token_ids[i, : len(tokens)] = tokens
            if request is not None:
                for spec, table in zip(self.specs, tables, strict=True):
                    table[i] = self._table_row(spec, request, len(tokens))
        return StepBatch(
            token_ids,
            np.array([0 if r is None else r.num_computed for r, _ in rows], np.int32),
            np.array([len(tokens) for _, tokens in rows], np.int32),
            tuple(tables),
        )

    def _table_row(self, spec: Any, request: Request, num_new: int) -> np.ndarray:
        if is_state(spec):
            read, write = request.state_blocks
            return np.array([read if request.num_computed else -1, write])
        used = -(-(request.num_computed + num_new) // BLOCK_SIZE)
        return np.where(np.arange(len(request.table)) < used, request.table, -1)

    def step(self, rows: Sequence[tuple[Request | None, Sequence[int]]], width: int) -> np.ndarray:
        """Runs one step and moves the requests on; logits (B, vocab)."""
        logits, self.caches = self._step(self.model.params, self.caches, self.batch(rows, width))
        for request, tokens in rows:
            if request is not None:
                request.num_computed += len(tokens)
                request.state_blocks = (request.state_blocks[1], request.state_blocks[0])
        return np.asarray(logits)

    def prefill(
        self, request: Request, prompt: Sequence[int], shapes: Sequence[int] = PREFILL_SHAPES
    ) -> np.ndarray:
        """Logits (vocab,) after ``prompt``, computed in steps of the given widths."""
        for chunk, width in chunks(prompt, shapes):
            logits = self.step([(request, chunk)], width)
        return logits[0]

    def decode(self, rows: Sequence[Request | None], first: Sequence[int], steps: int) -> list[list[int]]:
        """Greedy tokens of each row, ``first`` included, ``steps`` in all."""
        outputs = [[token] for token in first]
        for _ in range(steps - 1):
            batch = [(row, [out[-1]] if row else []) for row, out in zip(rows, outputs, strict=True)]
            for out, logits in zip(outputs, self.step(batch, 1), strict=True):
                out.append(int(logits.argmax()))
        return outputs


def jitted_step(model: Model) -> Any:
    """One jitted step for each model, so that all runners share its compiled programs."""
    if model.name not in _STEPS:
        _STEPS[model.name] = jax.jit(model.step, donate_argnums=1)
    return _STEPS[model.name]


_STEPS: dict[str, Any] = {}


def is_state(spec: Any) -> bool:
    return isinstance(spec, MambaSpec)


def chunks(prompt: Sequence[int], shapes: Sequence[int]) -> Iterator[tuple[Sequence[int], int]]:
    """Cuts a prompt into steps: the widest shape while it fits, then the narrowest that holds the rest."""
    start = 0
    while start < len(prompt):
        left = len(prompt) - start
        width = next((shape for shape in sorted(shapes) if shape >= left), max(shapes))
        yield prompt[start : start + width], width
        start += width


def steps_to_compare(case: dict[str, Any], min_margin: float) -> int:
    """Steps before the first at which the reference itself is nearly tied."""
    margins = case["margins"]
    return next((i for i, margin in enumerate(margins) if margin < min_margin), len(margins))


TINY_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 40,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def tiny_gemma3_tensors() -> dict[str, np.ndarray]:
    """Random weights for :data:`TINY_GEMMA3`, under their Hugging Face names."""
    rng = np.random.default_rng(3)
    hidden, inner, head = 64, 128, 32
    matrices = {
        "self_attn.q_proj": (4 * head, hidden),
        "self_attn.k_proj": (2 * head, hidden),
        "self_attn.v_proj": (2 * head, hidden),
        "self_attn.o_proj": (hidden, 4 * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {f"{side}_{part}": hidden for side in ("pre", "post") for part in ("feedforward_layernorm",)}
    norms |= {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((256, hidden)) * 0.3,
        "model.norm.weight": rng.standard_normal(hidden) * 0.1,
    }
    for layer in range(3):
        for name, shape in matrices.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.standard_normal(shape) * shape[1] ** -0.5
        for name, size in norms.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.standard_normal(size) * 0.1
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_directory(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path
