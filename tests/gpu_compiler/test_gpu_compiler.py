"""What XLA's GPU compiler makes of the ops for an H100: leaves that are donated stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hybrid_step
import jax
import jax.numpy as jnp
import pytest
from gpu_program import (
    GpuProgram,
    compile_for_h100,
    custom_calls_for_h100,
    h100,
    has_cuda_handlers,
    stored_bytes,
)
from hybrid_step import CACHES, CANONICAL, LEAF_BYTES, NUM_STEPS, Caches, Numbers, Op, decode, move_all

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.testing import LAYOUT_CASES, LayoutCase, layout_case
from jaxkv.transfer import ops, xla_ops

SMALLEST_LEAF = min(LEAF_BYTES)
TOKEN_BYTES = 4
XLA_CASES = ("packed_kv", "block_axis_last", "float4_scales_float8_e8m0fnu", "mamba_two_dtypes", "dense_int4")

Form = Callable[[Op, HostPool, Caches, jax.Array, jax.Array, Any], Any]
"""A program around an op. Takes caches, token, position and numbers; returns the caches first."""


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    h100()


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 16) as opened:
        yield opened


def alone(op, pool, caches, token, position, given):
    token, results, caches = move_all(op, pool, token, given, caches)
    return caches, token, results


def before_a_decode_step(op, pool, caches, token, position, given):
    token, results, caches = move_all(op, pool, token, given, caches)
    hidden, caches = decode(caches, position)
    return caches, token, results, hidden


def after_a_decode_step(op, pool, caches, token, position, given):
    hidden, caches = decode(caches, position)
    token, results, caches = move_all(op, pool, token, given, caches)
    return caches, token, results, hidden


def ordered_before_a_decode_step(op, pool, caches, token, position, given):
    token, results, _ = move_all(op, pool, token, given, caches)
    results, caches = jax.lax.optimization_barrier((results, caches))
    hidden, caches = decode(caches, position)
    return caches, token, results, hidden


def in_a_scan(op, pool, caches, token, position, given):
    def step(carry: Any, given: Numbers) -> Any:
        caches, token, position = carry
        hidden, caches = decode(caches, position)
        token, results, caches = move_all(op, pool, token, given, caches)
        return (caches, token, position + 1), (results, hidden)

    (caches, token, _), results = jax.lax.scan(step, (caches, token, position), given)
    return caches, token, results


def in_a_loop(op, pool, caches, token, position, given):
    def step(i: jax.Array, carry: Any) -> Any:
        caches, token, _ = carry
        token, results, caches = move_all(op, pool, token, jax.tree.map(lambda x: x[i], given), caches)
        return decode(caches, position + i)[1], token, results

    first = jax.tree.map(lambda x: x[0], given)
    like = jax.eval_shape(lambda *args: move_all(op, pool, *args)[1], token, first, caches)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.fori_loop(0, NUM_STEPS, step, (caches, token, nothing))


LOOPS: tuple[Form, ...] = (in_a_scan, in_a_loop)
FORMS: tuple[Form, ...] = (alone, before_a_decode_step, after_a_decode_step, *LOOPS)
WRITING = ("scatter_pages", "offload", "restore", "write_blocks")


def named(*functions: Form) -> Any:
    return pytest.mark.parametrize("form", functions, ids=lambda form: form.__name__)


def program_of(form: Form, op: str, pool: HostPool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``form`` around the op on all groups, and its arguments: first the caches and the token."""

    def program(caches: Caches, token: jax.Array, position: jax.Array, given: Any) -> Any:
        return form(getattr(hybrid_step, op), pool, caches, token, position, given)

    given = hybrid_step.numbers(*((NUM_STEPS,) if form in LOOPS else ()))
    return program, (CACHES, pool.token(), jnp.int32(0), given)


def compile_form(form: Form, op: str, pool: HostPool, *, donated: bool) -> GpuProgram:
    program, arguments = program_of(form, op, pool)
    return compile_for_h100(program, *arguments, donated=(0, 1) if donated else ())


def assert_in_place(program: GpuProgram) -> None:
    assert program.aliased_bytes == sum(LEAF_BYTES) + TOKEN_BYTES
    assert program.new_arrays(SMALLEST_LEAF) == []
    assert program.temporary_bytes < SMALLEST_LEAF


@pytest.mark.parametrize("op", WRITING)
@named(*FORMS)
def test_donated_leaves_are_written_where_they_are(form: Form, op: str, pool: HostPool) -> None:
    program = compile_form(form, op, pool, donated=True)
    assert_in_place(program)
    num_tokens = op in ("offload", "restore")
    aliases = [len(pages.leaves) + num_tokens for pages in CANONICAL.groups]
    assert sorted(program.aliases_of(f"jaxkv_{op}")) == sorted(aliases)


@pytest.mark.parametrize("op", WRITING)
@named(alone, after_a_decode_step, in_a_scan)
def test_undonated_leaves_are_copied_once_each(form: Form, op: str, pool: HostPool) -> None:
    program = compile_form(form, op, pool, donated=False)
    assert program.aliased_bytes == 0
    assert program.new_arrays(SMALLEST_LEAF) == ["copy"] * len(LEAF_BYTES)


@pytest.mark.parametrize("op", ["gather_pages", "read_blocks"])
@named(ordered_before_a_decode_step, after_a_decode_step, in_a_scan)
def test_a_step_that_donates_its_caches_is_read_without_a_copy(form: Form, op: str, pool: HostPool) -> None:
    assert_in_place(compile_form(form, op, pool, donated=True))


@pytest.mark.parametrize("op", ["gather_pages", "read_blocks", "xla_gather_pages"])
def test_leaves_that_are_only_read_are_neither_donated_nor_copied(op: str, pool: HostPool) -> None:
    def read(caches: Caches, token: jax.Array, given: Numbers) -> Any:
        return move_all(getattr(hybrid_step, op), pool, token, given, caches)[1]

    program = compile_for_h100(read, CACHES, pool.token(), hybrid_step.numbers())
    assert program.aliased_bytes == 0
    assert program.new_arrays(SMALLEST_LEAF) == []
    assert program.temporary_bytes < SMALLEST_LEAF


def test_a_read_that_nothing_orders_before_the_step_costs_copies(pool: HostPool) -> None:
    # Why ``gather_pages`` asks for a barrier. Where this fails, XLA has learned to do without it.
    program = compile_form(before_a_decode_step, "gather_pages", pool, donated=True)
    assert set(program.new_arrays(SMALLEST_LEAF)) == {"copy"}


@named(*FORMS)
def test_the_ops_in_plain_jax_write_donated_leaves_where_they_are(form: Form, pool: HostPool) -> None:
    assert_in_place(compile_form(form, "xla_scatter_pages", pool, donated=True))


@pytest.mark.skipif(not has_cuda_handlers(), reason="jaxkv was built without its handlers for CUDA")
@pytest.mark.parametrize("op", ["gather_pages", "scatter_pages", "offload", "restore"])
@named(after_a_decode_step, in_a_scan)
def test_command_buffers_hold_page_ops_and_no_pool_ops(form: Form, op: str, pool: HostPool) -> None:
    program, arguments = program_of(form, op, pool)
    number = len(CANONICAL.groups)
    expected = {"inside": number, "outside": 0} if op.endswith("_pages") else {"inside": 0, "outside": number}
    assert custom_calls_for_h100(program, *arguments, donated=(0, 1)) == expected


@pytest.mark.parametrize(
    ("ops_of", "case"),
    [
        *(pytest.param(ops, case, id=f"ffi-{case}") for case in LAYOUT_CASES),
        *(pytest.param(xla_ops, layout_case(name), id=f"xla-{name}") for name in XLA_CASES),
    ],
)
def test_every_layout_is_written_where_it_is(ops_of: Any, case: LayoutCase) -> None:
    kv_caches = case.build(1)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    for group, pages in enumerate(canonical.groups):
        leaves = canonical.group_leaves(kv_caches, GroupId(group))
        sizes = [stored_bytes(leaf) for leaf in leaves]

        def write(staging: jax.Array, ids: jax.Array, leaves: list[jax.Array], pages: Any = pages) -> Any:
            return ops_of.scatter_pages(staging, ids, leaves, pages)

        records = jnp.zeros((1, pages.record_bytes), jnp.uint8)
        program = compile_for_h100(write, records, jnp.zeros(1, jnp.int32), leaves, donated=[2])
        assert program.aliased_bytes == sum(sizes)
        assert program.new_arrays(min(sizes)) == []


def test_an_array_that_is_returned_as_it_was_and_written_is_seen_to_be_copied() -> None:
    leaf = jnp.zeros((64, 256), jnp.float32)
    program = compile_for_h100(lambda leaf: (leaf.at[3].set(1), leaf), leaf, donated=[0])
    assert set(program.new_arrays(leaf.nbytes)) == {"copy"}


def test_an_array_that_is_computed_as_a_whole_is_seen() -> None:
    leaf = jnp.zeros((64, 256), jnp.float32)
    program = compile_for_h100(lambda leaf: leaf * 2, leaf, donated=[0])
    assert program.new_arrays(leaf.nbytes) == ["multiply"]
