"""The chunked form of Mamba-2's recurrence: matrix products inside chunks, a short scan between them.

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 6. Shapes in comments use B rows,
T tokens, L tokens per chunk, G groups, R heads per group, D head size, N state size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SSDInputs(NamedTuple):
    """``x`` (B, T, H, D), ``dt`` (B, T, H), ``a`` (H,) negative, ``b`` and ``c`` (B, T, G, N)."""

    x: jax.Array
    dt: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array


def chunked_ssd(inputs: SSDInputs, state: jax.Array, chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Runs ``s[t] = exp(a * dt[t]) * s[t - 1] + dt[t] * x[t] b[t]``, ``y[t] = s[t] c[t]`` from ``state``.

    ``state`` (B, H, D, N). Returns y (B, T, H, D) and the last state; ``dt == 0`` leaves it alone.
    """
    rows, tokens, num_heads, head_size = inputs.x.shape
    groups = inputs.b.shape[2]
    length = min(tokens, chunk_tokens)
    padded = -tokens % length

    def chunks(value: jax.Array, *tail: int) -> jax.Array:
        """(B, T, ...) to (T / L, B, L, *tail), zeros after the end."""
        value = jnp.pad(value, [(0, 0), (0, padded), *[(0, 0)] * (value.ndim - 2)])
        return value.reshape(rows, -1, length, *tail).swapaxes(0, 1)

    by_group = (groups, num_heads // groups)
    log_decay = inputs.dt * inputs.a
    scaled_x = inputs.x * inputs.dt[..., None]
    xs = (
        chunks(scaled_x, *by_group, head_size),
        chunks(log_decay, *by_group),
        chunks(inputs.b, groups, inputs.b.shape[3]),
        chunks(inputs.c, groups, inputs.c.shape[3]),
    )
    grouped = state.reshape(rows, *by_group, head_size, -1)
    grouped, ys = jax.lax.scan(_one_chunk, grouped, xs)
    y = ys.swapaxes(0, 1).reshape(rows, -1, num_heads, head_size)[:, :tokens]
    return y, grouped.reshape(state.shape)


def _one_chunk(
    state: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One chunk from ``state`` (B, G, R, D, N).

    ``chunk`` holds x (B, L, G, R, D), log decay (B, L, G, R), b and c (B, L, G, N).
    """
    x, log_decay, b, c = chunk
    total = jnp.cumsum(log_decay, axis=1)
    decay = jnp.exp(total)
    # What token s adds to token t decays over the tokens between them: (B, G, R, t, s).
    between = total.transpose(0, 2, 3, 1)
    between = between[..., :, None] - between[..., None, :]
    causal = jnp.tri(x.shape[1], dtype=bool)
    weights = jnp.exp(jnp.where(causal, between, -jnp.inf)) * jnp.einsum("btgn,bsgn->bgts", c, b)[:, :, None]
    y = jnp.einsum("bgrts,bsgrd->btgrd", weights, x)
    y = y + jnp.einsum("btgn,bgrdn->btgrd", c, state) * decay[..., None]
    to_end = jnp.exp(total[:, -1:] - total)
    added = jnp.einsum("bsgrd,bsgn->bgrdn", x * to_end[..., None], b)
    return state * decay[:, -1, :, :, None, None] + added, y
