"""RecurrentGemma over paged caches (Botev et al. 2024, arXiv:2404.07839).

Its design is Griffin (De et al. 2024, arXiv:2402.19427): two recurrent blocks (a short
convolution, then the real-gated linear recurrent unit RG-LRU) to one block of local attention, each followed
by a gated MLP; tied embeddings and capped logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxkv.serving.model import KVCaches, StepBatch
from jaxkv.spec import KVCacheConfig, LayerSpec, MambaSpec, SlidingWindowSpec
from jaxkv_models import attention, caches, layers

_GATE_POWER = 8.0
"""``c`` in the paper: the recurrence is ``sigmoid(recurrent_param) ** (c * gate)``."""


@final
@dataclass(frozen=True, slots=True)
class RecurrentGemmaConfig:
    """Sizes of a RecurrentGemma model. ``is_recurrent`` has one entry per layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_recurrent: tuple[bool, ...]
    lru_width: int
    conv_width: int
    sliding_window: int
    rope_base: float
    rotary_dim: int
    logit_cap: float
    rms_eps: float
    max_model_len: int

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name; matrices are (out, in), the gates' (heads, in, out)."""
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "final_norm.weight": (self.hidden_size,),
        }
        for layer, is_recurrent in enumerate(self.is_recurrent):
            temporal = self._recurrent_shapes() if is_recurrent else self._attention_shapes()
            shapes |= {f"layers.{layer}.temporal_block.{name}": shape for name, shape in temporal.items()}
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._mlp_shapes().items()}
        return shapes

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "temporal_pre_norm.weight": (hidden,),
            "channel_pre_norm.weight": (hidden,),
            "mlp_block.gate_proj.weight": (inner, hidden),
            "mlp_block.gate_proj.bias": (inner,),
            "mlp_block.up_proj.weight": (inner, hidden),
            "mlp_block.up_proj.bias": (inner,),
            "mlp_block.down_proj.weight": (hidden, inner),
            "mlp_block.down_proj.bias": (hidden,),
        }

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        q_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return {
            "q_proj.weight": (q_dim, hidden),
            "k_proj.weight": (kv_dim, hidden),
            "v_proj.weight": (kv_dim, hidden),
            "o_proj.weight": (hidden, q_dim),
            "o_proj.bias": (hidden,),
        }

    def _recurrent_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, width, gate = self.hidden_size, self.lru_width, self.lru_width // self.num_heads
        return {
            "linear_x.weight": (width, hidden),
            "linear_x.bias": (width,),
            "linear_y.weight": (width, hidden),
            "linear_y.bias": (width,),
            "linear_out.weight": (hidden, width),
            "linear_out.bias": (hidden,),
            "conv_1d.weight": (width, 1, self.conv_width),
            "conv_1d.bias": (width,),
            "rg_lru.recurrent_param": (width,),
            "rg_lru.input_gate_weight": (self.num_heads, gate, gate),
            "rg_lru.input_gate_bias": (self.num_heads, gate),
            "rg_lru.recurrent_gate_weight": (self.num_heads, gate, gate),
            "rg_lru.recurrent_gate_bias": (self.num_heads, gate),
        }


@final
@dataclass(frozen=True, slots=True)
class RecurrentGemma:
    """A ``jaxkv.serving.model.Model``: two cache groups, sliding window and recurrent states."""

    name: str
    config: RecurrentGemmaConfig
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
        """The attention layers, then the recurrent layers; recurrent states are always float32."""
        config = self.config
        sliding = SlidingWindowSpec(
            block_size, config.num_kv_heads, config.head_size, dtype, config.sliding_window
        )
        state = MambaSpec(
            block_size,
            shapes=((config.conv_width - 1, config.lru_width), (config.lru_width,)),
            dtypes=(dtype, jnp.float32),
        )
        return [
            (self._layers_of(recurrent=False), sliding),
            (self._layers_of(recurrent=True), state),
        ]

    def _layers_of(self, *, recurrent: bool) -> tuple[str, ...]:
        kinds = enumerate(self.config.is_recurrent)
        return tuple(layer_name(i, recurrent=kind) for i, kind in kinds if kind == recurrent)

    def init_caches(self, config: KVCacheConfig) -> KVCaches:
        """Zeroed pages (P, S, H, D) and states (N, K - 1, W) and (N, W)."""
        return caches.init_caches(config)

    def step(
        self, params: layers.Params, kv_caches: Mapping[str, Any], batch: StepBatch
    ) -> tuple[jax.Array, KVCaches]:
        """Logits (B, vocab_size) of each row's last real token, and the caches with the new tokens."""
        config, new_caches = self.config, dict(kv_caches)
        table, state_blocks = batch.block_tables
        positions, _ = attention.token_positions(batch)
        angles = layers.rope_angles(positions, config.rotary_dim, config.rope_base)
        pages = kv_caches[self._layers_of(recurrent=False)[0]]
        plan = attention.plan_attention(batch, table, pages[0].shape[1], config.sliding_window)
        # The published model rounds this factor to bfloat16.
        x = params["embed_tokens.weight"][batch.token_ids] * _rounded_sqrt(config.hidden_size)  # (B, T, E)
        for i, is_recurrent in enumerate(config.is_recurrent):
            weights, name = layers.subtree(params, f"layers.{i}."), layer_name(i, recurrent=is_recurrent)
            temporal = layers.subtree(weights, "temporal_block.")
            hidden = layers.rms_norm(x, weights["temporal_pre_norm.weight"], config.rms_eps)
            cache = kv_caches[name]
            if is_recurrent:
                out, new_caches[name] = _recurrent_block(temporal, hidden, cache, (batch, state_blocks))
            else:
                out, new_caches[name] = _attention(config, temporal, hidden, cache, (plan, angles))
            x = x + out
            hidden = layers.rms_norm(x, weights["channel_pre_norm.weight"], config.rms_eps)
            x = x + layers.gated_mlp(layers.subtree(weights, "mlp_block."), hidden, layers.gelu_tanh)
        x = layers.last_real_token(x, batch.num_new)
        x = layers.rms_norm(x, params["final_norm.weight"], config.rms_eps)
        logits = layers.linear(params, "embed_tokens", x)
        return jnp.tanh(logits / config.logit_cap) * config.logit_cap, new_caches


def layer_name(layer: int, *, recurrent: bool) -> str:
    """Name of a layer in the cache pytree."""
    return f"layers.{layer}.{'recurrent' if recurrent else 'attention'}"


def _rounded_sqrt(hidden_size: int) -> float:
    return float(np.sqrt(hidden_size).astype(ml_dtypes.bfloat16))


def _attention(
    config: RecurrentGemmaConfig,
    weights: layers.Params,
    x: jax.Array,
    cache: attention.PageCache,
    context: tuple[attention.AttentionPlan, tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, attention.PageCache]:
    plan, angles = context

    def heads(name: str) -> jax.Array:
        return layers.linear(weights, f"{name}_proj", x).reshape(*x.shape[:2], -1, config.head_size)

    cache = attention.write_kv(plan, cache, layers.apply_rope(heads("k"), angles), heads("v"))
    out = attention.attend(plan, cache, layers.apply_rope(heads("q"), angles), config.head_size**-0.5)
    return layers.linear(weights, "o_proj", out), cache


def _recurrent_block(
    weights: layers.Params,
    x: jax.Array,
    cache: caches.StateCache,
    context: tuple[StepBatch, jax.Array],
) -> tuple[jax.Array, caches.StateCache]:
    """Griffin's recurrent block on ``x`` (B, T, E); state blocks (B, 2) to read from and to write to."""
    batch, blocks = context
    history, state = caches.read_states(cache, blocks[:, 0])
    gate = layers.gelu_tanh(layers.linear(weights, "linear_y", x))
    u = layers.linear(weights, "linear_x", x)  # (B, T, W)
    u, history = layers.causal_conv(layers.subtree(weights, "conv_1d."), u, history, batch.num_new)
    h, state = _rg_lru(layers.subtree(weights, "rg_lru."), u, state, batch)
    cache = caches.write_states(cache, blocks[:, 1], (history, state), batch.num_new)
    return layers.linear(weights, "linear_out", h * gate), cache


def _rg_lru(
    weights: layers.Params, u: jax.Array, state: jax.Array, batch: StepBatch
) -> tuple[jax.Array, jax.Array]:
    """RG-LRU on ``u`` (B, T, W) from ``state`` (B, W) to all outputs and the last state.

    ``h[t] = a[t] * h[t - 1] + sqrt(1 - a[t] ** 2) * i[t] * u[t]``, without the root at position 0. One token
    after another, so that where a prompt is cut into chunks changes no bit.
    """
    positions, is_new = attention.token_positions(batch)
    log_a = -_GATE_POWER * _gate(weights, "recurrent_gate", u) * jax.nn.softplus(weights["recurrent_param"])
    scale = jnp.where((positions == 0)[:, :, None], 1.0, jnp.sqrt(-jnp.expm1(2.0 * log_a)))
    # Padding leaves the state as it is: a = 1 and no input.
    a = jnp.where(is_new[:, :, None], jnp.exp(log_a), 1.0)
    inputs = jnp.where(is_new[:, :, None], u * _gate(weights, "input_gate", u) * scale, 0.0)

    def advance(h: jax.Array, at_t: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = at_t[0] * h + at_t[1]
        return h, h

    state, outputs = jax.lax.scan(advance, state, (a.swapaxes(0, 1), inputs.swapaxes(0, 1)))
    return outputs.swapaxes(0, 1), state


def _gate(weights: layers.Params, name: str, u: jax.Array) -> jax.Array:
    """A block-diagonal linear layer over heads, then a sigmoid: (B, T, W) to (B, T, W)."""
    weight, bias = weights[f"{name}_weight"], weights[f"{name}_bias"]
    heads = u.reshape(*u.shape[:2], weight.shape[0], -1)
    return jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", heads, weight) + bias).reshape(u.shape)
