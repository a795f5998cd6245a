"""Gemma 3 text decoder over paged caches (Gemma Team 2025, "Gemma 3 Technical Report", arXiv:2503.19786).

Five sliding-window layers to one full-attention layer, grouped queries with normalised q and k, one RoPE base
for each kind of layer, norms before and after every block, tied embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
from jax.typing import DTypeLike

from jaxkv.serving.model import KVCaches, StepBatch
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, LayerSpec, SlidingWindowSpec
from jaxkv_models import attention, caches, layers


@final
@dataclass(frozen=True, slots=True)
class Gemma3Config:
    """Sizes of a Gemma 3 text model. ``is_sliding`` has one entry per layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_sliding: tuple[bool, ...]
    sliding_window: int
    local_rope_base: float
    global_rope_base: float
    global_rope_factor: float
    query_scale: float
    rms_eps: float
    max_model_len: int

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name; matrices are (out, in)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        per_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_dim, hidden),
            "self_attn.k_proj.weight": (kv_dim, hidden),
            "self_attn.v_proj.weight": (kv_dim, hidden),
            "self_attn.q_norm.weight": (self.head_size,),
            "self_attn.k_norm.weight": (self.head_size,),
            "self_attn.o_proj.weight": (hidden, q_dim),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "post_feedforward_layernorm.weight": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, hidden),
            "norm.weight": (hidden,),
        }
        for layer in range(len(self.is_sliding)):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in per_layer.items()}
        return shapes


@final
@dataclass(frozen=True, slots=True)
class Gemma3:
    """A ``jaxkv.serving.model.Model``: two cache groups, full attention and sliding window."""

    name: str
    config: Gemma3Config
    params: layers.Params

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.config.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens a sequence may have."""
        return self.config.max_model_len

    def cache_groups(self, block_size: int, dtype: DTypeLike) -> Sequence[tuple[tuple[str, ...], LayerSpec]]:
        """The full-attention layers, then the sliding-window layers."""
        config = self.config
        full = FullAttentionSpec(block_size, config.num_kv_heads, config.head_size, dtype)
        sliding = SlidingWindowSpec(
            block_size, config.num_kv_heads, config.head_size, dtype, config.sliding_window
        )
        groups: list[tuple[tuple[str, ...], LayerSpec]] = [
            (self._layers_of(sliding=False), full),
            (self._layers_of(sliding=True), sliding),
        ]
        return [group for group in groups if group[0]]

    def _layers_of(self, *, sliding: bool) -> tuple[str, ...]:
        return tuple(layer_name(i) for i, kind in enumerate(self.config.is_sliding) if kind == sliding)

    def init_caches(self, config: KVCacheConfig) -> KVCaches:
        """Zeroed K and V pages (P, S, H, D) for every layer."""
        return caches.init_caches(config)

    def step(
        self, params: layers.Params, kv_caches: Mapping[str, Any], batch: StepBatch
    ) -> tuple[jax.Array, KVCaches]:
        """Logits (B, vocab_size) of each row's last real token, and the caches with the new tokens."""
        config, new_caches = self.config, dict(kv_caches)
        plans = self._plan(kv_caches, batch)
        x = params["embed_tokens.weight"][batch.token_ids] * math.sqrt(config.hidden_size)  # (B, T, E)
        for i, is_sliding in enumerate(config.is_sliding):
            name = layer_name(i)
            weights = layers.subtree(params, f"layers.{i}.")
            x, new_caches[name] = _decoder_layer(config, weights, x, kv_caches[name], plans[is_sliding])
        x = layers.last_real_token(x, batch.num_new)
        x = layers.rms_norm(x, params["norm.weight"], config.rms_eps)
        return layers.linear(params, "embed_tokens", x), new_caches

    def _plan(self, kv_caches: Mapping[str, Any], batch: StepBatch) -> dict[bool, _LayerContext]:
        """For full (False) and sliding (True) layers: the attention plan and the rotary angles."""
        config = self.config
        positions, _ = attention.token_positions(batch)
        tables = iter(batch.block_tables)
        contexts: dict[bool, _LayerContext] = {}
        for sliding in (False, True):
            names = self._layers_of(sliding=sliding)
            if not names:
                continue
            window = config.sliding_window if sliding else None
            base = config.local_rope_base if sliding else config.global_rope_base
            factor = 1.0 if sliding else config.global_rope_factor
            plan = attention.plan_attention(batch, next(tables), kv_caches[names[0]][0].shape[1], window)
            contexts[sliding] = plan, layers.rope_angles(positions, config.head_size, base, factor)
        return contexts


_LayerContext = tuple[attention.AttentionPlan, tuple[jax.Array, jax.Array]]


def layer_name(layer: int) -> str:
    """Name of a layer in the cache pytree."""
    return f"layers.{layer}.attention"


def _decoder_layer(
    config: Gemma3Config,
    weights: layers.Params,
    x: jax.Array,
    cache: attention.PageCache,
    context: _LayerContext,
) -> tuple[jax.Array, attention.PageCache]:
    """One layer on ``x`` (B, T, E): attention, then MLP, each normalised on both sides."""

    def norm(name: str, value: jax.Array) -> jax.Array:
        return layers.rms_norm(value, weights[f"{name}.weight"], config.rms_eps)

    hidden, cache = _attention(config, weights, norm("input_layernorm", x), cache, context)
    x = x + norm("post_attention_layernorm", hidden)
    hidden = norm("pre_feedforward_layernorm", x)
    hidden = layers.gated_mlp(layers.subtree(weights, "mlp."), hidden, layers.gelu_tanh)
    return x + norm("post_feedforward_layernorm", hidden), cache


def _attention(
    config: Gemma3Config,
    weights: layers.Params,
    x: jax.Array,
    cache: attention.PageCache,
    context: _LayerContext,
) -> tuple[jax.Array, attention.PageCache]:
    plan, angles = context

    def heads(name: str) -> jax.Array:
        return layers.linear(weights, f"self_attn.{name}_proj", x).reshape(*x.shape[:2], -1, config.head_size)

    def normed(name: str) -> jax.Array:
        weight = weights[f"self_attn.{name}_norm.weight"]
        return layers.apply_rope(layers.rms_norm(heads(name), weight, config.rms_eps), angles)

    cache = attention.write_kv(plan, cache, normed("k"), heads("v"))
    out = attention.attend(plan, cache, normed("q"), config.query_scale)
    return layers.linear(weights, "self_attn.o_proj", out), cache
