"""Bamba over paged caches: Mamba-2 with a few full-attention layers (IBM, Princeton, CMU and UIUC 2024).

Mamba-2 follows Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060; prefill runs its chunked form,
which is matrix products. Attention rotates part of each head; every layer ends in a SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.serving.model import KVCaches, StepBatch
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, LayerSpec, MambaSpec
from jaxkv_models import attention, caches, layers
from jaxkv_models.ssd import SSDInputs, chunked_ssd


@final
@dataclass(frozen=True, slots=True)
class BambaConfig:
    """Sizes of a Bamba model. ``is_mamba`` has one entry per layer; ``dt_limit`` bounds the time step."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_mamba: tuple[bool, ...]
    mamba_heads: int
    mamba_head_size: int
    mamba_groups: int
    state_size: int
    conv_width: int
    conv_bias: bool
    chunk_tokens: int
    dt_limit: tuple[float, float]
    rope_base: float
    rotary_dim: int
    tied_embeddings: bool
    rms_eps: float
    max_model_len: int

    @property
    def inner_size(self) -> int:
        """Width of the Mamba-2 heads together."""
        return self.mamba_heads * self.mamba_head_size

    @property
    def conv_size(self) -> int:
        """Width of what the convolution sees: x, B and C side by side."""
        return self.inner_size + 2 * self.mamba_groups * self.state_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name; matrices are (out, in)."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, hidden),
            "final_layernorm.weight": (hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer, is_mamba in enumerate(self.is_mamba):
            mixer = self._mamba_shapes() if is_mamba else self._attention_shapes()
            in_layer = mixer | self._mlp_shapes()
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in in_layer.items()}
        return shapes

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "input_layernorm.weight": (hidden,),
            "pre_ff_layernorm.weight": (hidden,),
            "feed_forward.gate_proj.weight": (inner, hidden),
            "feed_forward.up_proj.weight": (inner, hidden),
            "feed_forward.down_proj.weight": (hidden, inner),
        }

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        q_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return {
            "self_attn.q_proj.weight": (q_dim, hidden),
            "self_attn.k_proj.weight": (kv_dim, hidden),
            "self_attn.v_proj.weight": (kv_dim, hidden),
            "self_attn.o_proj.weight": (hidden, q_dim),
        }

    def _mamba_shapes(self) -> dict[str, tuple[int, ...]]:
        per_head = (self.mamba_heads,)
        bias = {"mamba.conv1d.bias": (self.conv_size,)} if self.conv_bias else {}
        return {
            "mamba.in_proj.weight": (self.inner_size + self.conv_size + self.mamba_heads, self.hidden_size),
            "mamba.conv1d.weight": (self.conv_size, 1, self.conv_width),
            "mamba.A_log": per_head,
            "mamba.D": per_head,
            "mamba.dt_bias": per_head,
            "mamba.norm.weight": (self.inner_size,),
            "mamba.out_proj.weight": (self.hidden_size, self.inner_size),
            **bias,
        }


@final
@dataclass(frozen=True, slots=True)
class Bamba:
    """A ``jaxkv.serving.model.Model``: two cache groups, full attention and Mamba-2 states."""

    name: str
    config: BambaConfig
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
        """The attention layers, then the Mamba-2 layers; their recurrent states are always float32."""
        config = self.config
        full = FullAttentionSpec(block_size, config.num_kv_heads, config.head_size, dtype)
        state = MambaSpec(
            block_size,
            shapes=(
                (config.conv_width - 1, config.conv_size),
                (config.mamba_heads, config.mamba_head_size, config.state_size),
            ),
            dtypes=(dtype, jnp.float32),
        )
        return [(self._layers_of(mamba=False), full), (self._layers_of(mamba=True), state)]

    def _layers_of(self, *, mamba: bool) -> tuple[str, ...]:
        kinds = enumerate(self.config.is_mamba)
        return tuple(layer_name(i, mamba=kind) for i, kind in kinds if kind == mamba)

    def init_caches(self, config: KVCacheConfig) -> KVCaches:
        """Zeroed pages (P, S, H, D) and states (N, K - 1, W) and (N, H, D, state_size)."""
        return caches.init_caches(config)

    def step(
        self, params: layers.Params, kv_caches: Mapping[str, Any], batch: StepBatch
    ) -> tuple[jax.Array, KVCaches]:
        """Logits (B, vocab_size) of each row's last real token, and the caches with the new tokens."""
        config, new_caches = self.config, dict(kv_caches)
        table, state_blocks = batch.block_tables
        positions, _ = attention.token_positions(batch)
        angles = layers.rope_angles(positions, config.rotary_dim, config.rope_base)
        pages = kv_caches[self._layers_of(mamba=False)[0]]
        plan = attention.plan_attention(batch, table, pages[0].shape[1])
        x = params["embed_tokens.weight"][batch.token_ids]  # (B, T, E)
        for i, is_mamba in enumerate(config.is_mamba):
            weights, name = layers.subtree(params, f"layers.{i}."), layer_name(i, mamba=is_mamba)
            hidden = layers.rms_norm(x, weights["input_layernorm.weight"], config.rms_eps)
            if is_mamba:
                mixer = layers.subtree(weights, "mamba.")
                out, new_caches[name] = _mamba2(config, mixer, hidden, kv_caches[name], (batch, state_blocks))
            else:
                mixer = layers.subtree(weights, "self_attn.")
                out, new_caches[name] = _attention(config, mixer, hidden, kv_caches[name], (plan, angles))
            x = x + out
            hidden = layers.rms_norm(x, weights["pre_ff_layernorm.weight"], config.rms_eps)
            x = x + layers.gated_mlp(layers.subtree(weights, "feed_forward."), hidden, jax.nn.silu)
        x = layers.last_real_token(x, batch.num_new)
        x = layers.rms_norm(x, params["final_layernorm.weight"], config.rms_eps)
        head = "embed_tokens" if config.tied_embeddings else "lm_head"
        return layers.linear(params, head, x), new_caches


def layer_name(layer: int, *, mamba: bool) -> str:
    """Name of a layer in the cache pytree."""
    return f"layers.{layer}.{'mamba' if mamba else 'attention'}"


def _attention(
    config: BambaConfig,
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


def _mamba2(
    config: BambaConfig,
    weights: layers.Params,
    x: jax.Array,
    cache: caches.StateCache,
    context: tuple[StepBatch, jax.Array],
) -> tuple[jax.Array, caches.StateCache]:
    """A Mamba-2 mixer on ``x`` (B, T, E); state blocks (B, 2) to read from and to write to."""
    batch, blocks = context
    history, state = caches.read_states(cache, blocks[:, 0])
    inner, conv = config.inner_size, config.conv_size
    projected = layers.linear(weights, "in_proj", x)
    gate, xbc, dt = jnp.split(projected, [inner, inner + conv], axis=-1)
    xbc, history = layers.causal_conv(layers.subtree(weights, "conv1d."), xbc, history, batch.num_new)
    inputs = _ssd_inputs(config, weights, jax.nn.silu(xbc), dt, batch)
    y, state = chunked_ssd(inputs, state, config.chunk_tokens)
    y = y + weights["D"][:, None] * inputs.x  # (B, T, H, D)
    y = _gated_norm(config, weights["norm.weight"], y.reshape(gate.shape), gate)
    cache = caches.write_states(cache, blocks[:, 1], (history, state), batch.num_new)
    return layers.linear(weights, "out_proj", y), cache


def _ssd_inputs(
    config: BambaConfig, weights: layers.Params, xbc: jax.Array, dt: jax.Array, batch: StepBatch
) -> SSDInputs:
    """Splits the convolved ``xbc`` (B, T, W); the time step of padding is 0, which leaves the state alone."""
    rows = xbc.shape[:2]
    group_size = config.mamba_groups * config.state_size
    x, b, c = jnp.split(xbc, [config.inner_size, config.inner_size + group_size], axis=-1)
    dt = jnp.clip(jax.nn.softplus(dt + weights["dt_bias"]), *config.dt_limit)
    _, is_new = attention.token_positions(batch)
    return SSDInputs(
        x=x.reshape(*rows, config.mamba_heads, config.mamba_head_size),
        dt=jnp.where(is_new[:, :, None], dt, 0.0),
        a=-jnp.exp(weights["A_log"]),
        b=b.reshape(*rows, config.mamba_groups, config.state_size),
        c=c.reshape(*rows, config.mamba_groups, config.state_size),
    )


def _gated_norm(config: BambaConfig, weight: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """RMS norm of ``y * silu(gate)`` within each group of channels."""
    gated = (y * jax.nn.silu(gate)).reshape(*y.shape[:2], config.mamba_groups, -1)
    return layers.rms_norm(gated, jnp.ones(()), config.rms_eps).reshape(y.shape) * weight
