"""Views over shared memory: one block used by two kinds of layers, and nothing of the leaf copied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing import assert_same_bytes, numpy_copy
from jaxkv.transfer import BlockTransfer
from jaxkv.views import layer_views, write_together

S, H, D = 16, 2, 32
ATTENTION = FullAttentionSpec(S, H, D, jnp.float32)
PAGE_BYTES = 2 * S * H * D * 4
STATE = MambaSpec(S, ((3, 33), (4, 8, 16)), (jnp.bfloat16, jnp.float32), page_size_padded=PAGE_BYTES)
K, V = layer_views(ATTENTION)
CONV, SSM = layer_views(STATE)

NUM_BLOCKS = 1024
LEAF_BYTES = NUM_BLOCKS * PAGE_BYTES
LEAF = f"u8[{NUM_BLOCKS},{PAGE_BYTES}]"
SMALL_BYTES = LEAF_BYTES // 16
"""Far less than the leaf, and enough for what the steps below read."""

B, T = 4, 3
"""Sequences, and blocks in the table of each."""

BLOCKS = np.array([7, 900, -1, 1023], np.int32)
SLOTS = np.array([3, 15, 0, 8], np.int32)
TABLE = np.array([[5, 7, -1], [900, 2, -1], [0, 1, 3], [4, 6, 1023]], np.int32)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """``q [B, H, D]`` over ``k, v [B, tokens, H, D]``."""
    return jnp.einsum("bht,bthd->bhd", jax.nn.softmax(jnp.einsum("bhd,bthd->bht", q, k)), v)


def decode(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    leaf = K.write_tokens(leaf, BLOCKS, SLOTS, tokens)
    leaf = V.write_tokens(leaf, BLOCKS, SLOTS, tokens)
    return leaf, attention(tokens, K.read_tokens(leaf, TABLE), V.read_tokens(leaf, TABLE))


def attend_before_write(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = attention(tokens, K.read_tokens(leaf, TABLE), V.read_tokens(leaf, TABLE))
    return K.write_tokens(leaf, BLOCKS, SLOTS, out), out


def decode_in_a_loop(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.fori_loop(0, 3, lambda _, carry: decode(*carry), (leaf, tokens))


def prefill(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    pages = jnp.broadcast_to(tokens[:, None, None], (B, T, S, H, D))
    leaf = V.write(K.write(leaf, TABLE, pages), TABLE, pages)
    return leaf, V.read_tokens(leaf, TABLE)


def advance_state(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    conv, state = CONV.read(leaf, BLOCKS), SSM.read(leaf, BLOCKS)
    after = jnp.roll(conv, 1, axis=1), 0.5 * state + tokens.sum()
    return write_together((CONV, SSM), leaf, BLOCKS, after), state.sum(axis=3) + after[1].sum(axis=3)


def advance_state_array_by_array(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    conv = CONV.read(leaf, BLOCKS)
    leaf = CONV.write(leaf, BLOCKS, jnp.roll(conv, 1, axis=1))
    state = SSM.read(leaf, BLOCKS)
    return SSM.write(leaf, BLOCKS, 0.5 * state + tokens.sum()), state


def advance_state_in_a_loop(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.fori_loop(0, 3, lambda _, leaf: advance_state(leaf, tokens)[0], leaf), tokens


STEPS = (
    *(decode, decode_in_a_loop, attend_before_write, prefill),
    *(advance_state, advance_state_array_by_array, advance_state_in_a_loop),
)

IN_PLACE = {"parameter", "scatter", "dynamic-update-slice", "fusion", "while", "tuple", "get-tuple-element"}
DTYPE_BITS = {"pred": 8, "u8": 8, "s8": 8, "u16": 16, "bf16": 16, "u32": 32, "s32": 32, "f32": 32}


def compiled(step: Callable[..., Any], **options: Any) -> Any:
    struct: Any = jax.ShapeDtypeStruct
    leaf, tokens = struct((NUM_BLOCKS, PAGE_BYTES), jnp.uint8), struct((B, H, D), jnp.float32)
    return jax.jit(step, **options).lower(leaf, tokens).compile()


def arrays_of(text: str) -> Iterator[tuple[str, str, int]]:
    """Opcode, array type and bytes of everything the instructions of a program yield."""
    for result, opcode in re.findall(r"^.*? = (\(.*?\)|\S+) ([a-z][\w-]*)\(", text, re.MULTILINE):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            bits = math.prod(int(dim) for dim in dims.split(",") if dim) * DTYPE_BITS[dtype]
            yield opcode, f"{dtype}[{dims}]", bits // 8


def what_copies(text: str) -> list[tuple[str, str]]:
    """Whatever yields as many bytes as the leaf and is not the leaf itself, handed on or written in place."""
    large = [(opcode, array) for opcode, array, num_bytes in arrays_of(text) if num_bytes >= LEAF_BYTES]
    assert ("parameter", LEAF) in large
    return [(opcode, array) for opcode, array in large if opcode not in IN_PLACE or array != LEAF]


@pytest.mark.parametrize("step", STEPS)
def test_compiled_step_neither_copies_nor_retypes_the_leaf(step: Callable[..., Any]) -> None:
    program = compiled(step, donate_argnums=0)
    text = program.as_text()
    assert what_copies(text) == []
    assert re.search(r"input_output_alias=\{ \{0\}: \(0, \{\}", text)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == LEAF_BYTES
    assert memory.temp_size_in_bytes < SMALL_BYTES


def test_writing_tokens_never_handles_whole_pages() -> None:
    def write(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
        return K.write_tokens(leaf, BLOCKS, SLOTS, tokens)

    text = compiled(write, donate_argnums=0).as_text()
    others = [num_bytes for _, array, num_bytes in arrays_of(text) if array != LEAF]
    assert max(others) < B * K.num_bytes


def test_a_copy_or_another_dtype_of_the_leaf_would_be_seen() -> None:
    def retyped(leaf: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        words = jax.lax.bitcast_convert_type(leaf.reshape(NUM_BLOCKS, -1, 4), jnp.float32)
        words = words.at[7, : H * D].set(tokens[0].reshape(-1))
        return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(leaf.shape), tokens

    assert "copy" in {opcode for opcode, _ in what_copies(compiled(decode).as_text())}
    program = compiled(retyped, donate_argnums=0)
    assert any(array.startswith("f32") for _, array in what_copies(program.as_text()))
    assert program.memory_analysis().temp_size_in_bytes > SMALL_BYTES


@pytest.mark.parametrize("step", STEPS)
def test_donated_leaf_stays_where_it_is(step: Callable[..., Any]) -> None:
    leaf = jnp.zeros((NUM_BLOCKS, PAGE_BYTES), jnp.uint8)
    place = leaf.unsafe_buffer_pointer()
    after, _ = jax.jit(step, donate_argnums=0)(leaf, jnp.ones((B, H, D)))
    assert after.unsafe_buffer_pointer() == place
    assert leaf.is_deleted()


CONFIG = KVCacheConfig(
    (KVCacheGroupSpec(("attn",), ATTENTION, 8), KVCacheGroupSpec(("ssm",), STATE, 8)),
)
ATTN_GROUP, SSM_GROUP = GroupId(0), GroupId(1)


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bhd,bthd->bht", q, k)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bht,bthd->bhd", weights / weights.sum(axis=-1, keepdims=True), v)


def write_sequence(leaf: jax.Array, blocks: list[int], k: np.ndarray, v: np.ndarray) -> jax.Array:
    """All tokens of ``k`` and ``v``, ``[tokens, H, D]``, one after another into ``blocks``."""
    places = np.arange(len(k))
    ids, slots = np.array(blocks, np.int32)[places // S], (places % S).astype(np.int32)

    @jax.jit
    def write(leaf: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return V.write_tokens(K.write_tokens(leaf, ids, slots, k), ids, slots, v)

    return write(leaf, k, v)


def assert_attends(leaf: jax.Array, blocks: list[int], k: np.ndarray, v: np.ndarray) -> None:
    table = np.array([blocks], np.int32)
    keys, values = K.read_tokens(leaf, table)[:, : len(k)], V.read_tokens(leaf, table)[:, : len(v)]
    assert_same_bytes(keys, k)
    assert_same_bytes(values, v)
    q = np.linspace(-1, 1, H * D, dtype=np.float32).reshape(1, H, D)
    expected = numpy_attention(q, k[None], v[None])
    np.testing.assert_allclose(attention(q, keys, values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_one_block_serves_attention_then_a_state_and_both_come_back(backend: str) -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2 * S - 3, H, D)).astype(np.float32)
    states = (rng.standard_normal((3, 33)).astype(jnp.bfloat16), rng.standard_normal((4, 8, 16), np.float32))
    leaf = jnp.array(rng.integers(0, 256, (8, PAGE_BYTES), dtype=np.uint8))
    canonical = canonicalize({"attn": leaf, "ssm": leaf}, CONFIG)
    assert len(canonical.tensors) == 1

    leaf = write_sequence(leaf, [5, 2], k, v)
    assert_attends(leaf, [5, 2], k, v)
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool, backend=backend)
        with transfer.reserve(ATTN_GROUP, 1) as attn_slots, transfer.reserve(SSM_GROUP, 1) as ssm_slots:
            caches = {"attn": leaf, "ssm": leaf}
            assert transfer.offload(caches, ATTN_GROUP, [5], attn_slots).wait().error is None
            assert bytes(pool.view(attn_slots[0])) == k[:S].tobytes() + v[:S].tobytes()

            leaf = write_together((CONV, SSM), leaf, np.array([5], np.int32), [s[None] for s in states])
            caches = {"attn": leaf, "ssm": leaf}
            assert transfer.offload(caches, SSM_GROUP, [5], ssm_slots).wait().error is None
            state_bytes = b"".join(state.tobytes() for state in states)
            assert bytes(pool.view(ssm_slots[0]))[: len(state_bytes)] == state_bytes

            expected = numpy_copy(leaf)
            caches, ticket = transfer.restore(caches, ATTN_GROUP, [6], attn_slots)
            assert ticket.wait().error is None
            caches, ticket = transfer.restore(caches, SSM_GROUP, [1], ssm_slots)
            assert ticket.wait().error is None
    leaf = caches["attn"]
    assert caches["ssm"] is leaf
    assert_attends(leaf, [6, 2], k, v)
    for view, state in zip((CONV, SSM), states, strict=True):
        for block in (5, 1):
            assert_same_bytes(view.read(leaf, np.array([block], np.int32))[0], state)
    expected[6] = np.frombuffer(k[:S].tobytes() + v[:S].tobytes(), np.uint8)
    expected[1, : len(state_bytes)] = np.frombuffer(state_bytes, np.uint8)
    assert_same_bytes(leaf, expected)
