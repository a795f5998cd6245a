"""Pieces every model file shares: norms, rotary embeddings, gated MLPs, the choice of the last real token.

All arithmetic is float32. Shapes in comments use B rows, T tokens, H heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Params = Mapping[str, jax.Array]
"""Weights by their Hugging Face name, without the leading ``model.``; matrices are (out, in)."""

_FEW_ROWS = 128
"""Up to here the weights go on the left of a product: XLA's CPU backend repacks what stands on the right."""


def subtree(params: Params, prefix: str) -> dict[str, jax.Array]:
    """The weights under ``prefix``, named from there on."""
    start = len(prefix)
    return {name[start:]: array for name, array in params.items() if name.startswith(prefix)}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root mean square norm over the last axis; ``weight`` is the whole factor, Gemma's ``1 +`` included."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """``x`` (..., in) times the (out, in) matrix ``name``, plus its bias where there is one."""
    weight = params[f"{name}.weight"]
    rows = x.reshape(-1, x.shape[-1])
    inner = (((1,), (1,)), ((), ()))
    if 1 < len(rows) <= _FEW_ROWS:
        # Without the barrier the compiler folds the transpose away by swapping the operands back.
        y = _keep(jax.lax.dot_general(weight, rows, inner)).T
    else:
        y = jax.lax.dot_general(rows, weight, inner)
    y = y.reshape(*x.shape[:-1], -1)
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias


def _keep(x: jax.Array) -> jax.Array:
    """``x``, computed here and in this form: the compiler fuses or rewrites nothing across it."""
    kept: jax.Array = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    return kept


def gated_mlp(params: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``down(activation(gate(x)) * up(x))`` (Shazeer 2020, "GLU variants improve Transformer")."""
    gate = activation(linear(params, "gate_proj", x))
    return linear(params, "down_proj", gate * linear(params, "up_proj", x))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


def rope_angles(
    positions: jax.Array, rotary_dim: int, base: float, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """What ``apply_rope`` takes at ``positions`` (B, T), whose angles are slowed down ``factor`` times.

    Two factors (B, T, 1, rotary_dim), for an element and for its partner in the other half.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    frequencies = jnp.asarray(base**-exponents / factor, jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Joined here, they are computed once; as halves XLA would compute them again in every layer and head.
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first ``rotary_dim`` elements of each head of ``x`` (B, T, H, D); the rest pass through.

    The two halves of the rotated part form the pairs (Su et al. 2021, in GPT-NeoX order).
    """
    own, partner = angles
    size = own.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    turned = turned * own + jnp.roll(turned, size // 2, axis=-1) * partner
    return jnp.concatenate([turned, rest], axis=-1)


def last_real_token(x: jax.Array, num_new: jax.Array) -> jax.Array:
    """(B, E): the hidden state of each row's last real token in ``x`` (B, T, E)."""
    last = jnp.maximum(num_new - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def causal_conv(
    params: Params, x: jax.Array, history: jax.Array, num_new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution of ``x`` (B, T, W) that continues from ``history`` (B, K - 1, W).

    ``params`` holds ``weight`` (W, 1, K) and perhaps ``bias`` (W,). Returns the output (B, T, W) and the last
    K - 1 real inputs (B, K - 1, W).
    """
    weight = params["weight"][:, 0, :]  # (W, K)
    taps, steps = weight.shape[1], x.shape[1]
    inputs = jnp.concatenate([history, x], axis=1)  # (B, K - 1 + T, W)
    y = sum((inputs[:, k : k + steps] * weight[:, k] for k in range(taps)), start=jnp.zeros_like(x))
    if "bias" in params:
        y = y + params["bias"]
    kept = num_new[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)
    return y, jnp.take_along_axis(inputs, kept[:, :, None], axis=1)
