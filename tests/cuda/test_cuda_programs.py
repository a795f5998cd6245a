"""The ops inside programs that run again and again: loops, other buffers, other ids, donation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_caches import FACTOR, GROUP, SUMMAND, canonical_of, decoded, held, make_caches, on_host

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.records import GroupPages
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_bytes
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import ops, reference
from jaxkv.transfer.cuda_device import pin_pool
from jaxkv.transfer.status import StatusEntry

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20
NUM_BLOCKS = 24


def leaves_and_pages(case: LayoutCase, seed: int) -> tuple[list[jax.Array], GroupPages]:
    kv_caches = case.build(seed)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    return canonical.group_leaves(kv_caches, GroupId(0)), canonical.groups[0]


def host_bytes(leaves: list[jax.Array]) -> list[np.ndarray]:
    return [as_bytes(leaf).copy() for leaf in leaves]


def word_leaves(seed: int = 0) -> tuple[list[jax.Array], np.ndarray, GroupPages]:
    caches = make_caches(2, NUM_BLOCKS, 2 * KIB, seed)
    words, canonical = on_host(caches), canonical_of(caches)
    return canonical.group_leaves(caches, GROUP), words, canonical.groups[0]


def words_of(leaves: list[jax.Array]) -> np.ndarray:
    return on_host({str(i): leaf for i, leaf in enumerate(leaves)})


def rewrite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf * jnp.uint32(FACTOR) + jnp.uint32(SUMMAND) for leaf in leaves]


def some_ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_BLOCKS)[:count].astype(np.int32)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_donated_leaves_are_written_in_place_and_equal_the_reference(case: LayoutCase) -> None:
    leaves, pages = leaves_and_pages(case, 1)
    source, _ = leaves_and_pages(case, 2)
    ids = np.array([3, -1, 0, 5, 99, -7, 0], np.int32)
    staging = reference.gather_pages(host_bytes(source), np.array([2, 1, 0, 3, 0, 1, 2], np.int32), pages)
    expected = host_bytes(leaves)
    expected_status = reference.scatter_pages(staging, ids, expected, pages)
    before = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    scatter = jax.jit(lambda s, i, xs: ops.scatter_pages(s, i, xs, pages), donate_argnums=2)
    written, status = scatter(staging, ids, leaves)
    assert [leaf.unsafe_buffer_pointer() for leaf in written] == before
    assert status[: StatusEntry.ELAPSED_US].tolist() == expected_status[: StatusEntry.ELAPSED_US].tolist()
    for leaf, wanted in zip(written, expected, strict=True):
        assert_same_bytes(leaf, wanted)


def test_a_program_run_again_reads_the_ids_and_the_buffers_of_that_run() -> None:
    """Also where it was recorded in a command buffer: first with the same buffers, then with others."""
    leaves, words, pages = word_leaves()

    @partial(jax.jit, donate_argnums=0)
    def step(leaves: list[jax.Array], ids: jax.Array, into: jax.Array) -> Any:
        staging = ops.gather_pages(leaves, ids, pages)
        written, status = ops.scatter_pages(staging, into, rewrite(leaves), pages)
        return written, staging, status

    for run in range(12):
        if run == 6:
            leaves, words, _ = word_leaves(seed=1)
        ids, into = some_ids(run, 7), some_ids(100 + run, 7)
        into[run % 7] = -1
        leaves, staging, status = step(leaves, ids, into)
        records = words[ids]
        words = decoded(words)
        words[into[into >= 0]] = records[into >= 0]
        assert_same_bytes(staging, records)
        assert int(status[StatusEntry.MOVED]) == 6
        assert_same_bytes(words_of(leaves), words)


def test_page_ops_run_in_a_loop_whose_length_only_the_device_knows() -> None:
    leaves, words, pages = word_leaves()

    @partial(jax.jit, donate_argnums=0)
    def run(leaves: list[jax.Array], length: jax.Array) -> list[jax.Array]:
        def body(i: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
            staging = ops.gather_pages(leaves, i[None], pages)
            return ops.scatter_pages(staging, i[None] + 1, rewrite(leaves), pages)[0]

        return jax.lax.fori_loop(0, length, body, leaves)

    for length in (0, 1, 9):
        leaves = run(leaves, jnp.int32(length))
        for i in range(length):
            record = words[i].copy()
            words = decoded(words)
            words[i + 1] = record
        assert_same_bytes(words_of(leaves), words)


def test_page_ops_run_in_a_branch() -> None:
    leaves, words, pages = word_leaves()

    @partial(jax.jit, donate_argnums=0)
    def run(leaves: list[jax.Array], is_copied: jax.Array) -> list[jax.Array]:
        def copy(leaves: list[jax.Array]) -> list[jax.Array]:
            staging = ops.gather_pages(leaves, np.array([1, 2], np.int32), pages)
            return ops.scatter_pages(staging, np.array([7, 8], np.int32), leaves, pages)[0]

        return jax.lax.cond(is_copied, copy, rewrite, leaves)

    for is_copied in (True, False, False, True):
        leaves = run(leaves, jnp.bool_(is_copied))
        if is_copied:
            words[[7, 8]] = words[[1, 2]]
        else:
            words = decoded(words)
        assert_same_bytes(words_of(leaves), words)


@pytest.mark.parametrize("donated", [True, False], ids=["donated", "kept"])
def test_a_scan_offloads_and_restores_in_the_order_of_its_steps(*, donated: bool) -> None:
    leaves, words, pages = word_leaves()
    num_steps, count, lag = 40, 5, 3
    ids = np.stack([some_ids(step, count) for step in range(num_steps)])
    into = np.stack([some_ids(100 + step, count) for step in range(num_steps)])
    into[:lag] = -1
    with HostPool(4 * MIB) as pool:
        pin_pool(pool)
        slots = pool.reserve_slots(pages.record_bytes, num_steps * count)
        at = np.array([pool.address(slot) for slot in slots], np.int32).reshape(num_steps, count)

        @partial(jax.jit, donate_argnums=(1,) if donated else ())
        def run(token: jax.Array, leaves: list[jax.Array]) -> Any:
            def step(carry: Any, row: Any) -> Any:
                token, leaves = carry
                ids, at, into, loaded = row
                token, stored, leaves = ops.offload(pool, token, rewrite(leaves), ids, at, pages)
                token, status, leaves = ops.restore(pool, token, leaves, into, loaded, pages)
                return (token, leaves), (stored[StatusEntry.MOVED], status[StatusEntry.MOVED])

            return jax.lax.scan(step, (token, leaves), (ids, at, into, np.roll(at, lag, axis=0)))

        before = words.copy()
        for _ in range(2):  # The second run finds everything compiled, and recorded.
            (_, written), (stored, loaded) = run(pool.token(), leaves)
            records = []
            for step in range(num_steps):
                words = decoded(words)
                records.append(words[ids[step]])
                if step >= lag:
                    words[into[step]] = records[step - lag]
            assert stored.tolist() == [count] * num_steps
            assert loaded.tolist() == [0] * lag + [count] * (num_steps - lag)
            assert_same_bytes(held(pool, slots), np.concatenate(records).tobytes())
            assert_same_bytes(words_of(written), words)
            if donated:
                leaves = written
            else:
                assert_same_bytes(words_of(leaves), before)
                words = before.copy()
        pool.free_slots(slots)


def test_pool_ops_between_other_work_of_one_program_keep_their_place() -> None:
    leaves, words, pages = word_leaves()
    with HostPool(1 * MIB) as pool:
        pin_pool(pool)
        slots = pool.reserve_slots(pages.record_bytes, 4)
        at = np.array([pool.address(slot) for slot in slots], np.int32)

        @partial(jax.jit, donate_argnums=1)
        def run(token: jax.Array, leaves: list[jax.Array], ids: jax.Array, x: jax.Array) -> Any:
            token, _, leaves = ops.offload(pool, token, leaves, ids[:2], at[:2], pages)
            x = jnp.tanh(x @ x)
            leaves = rewrite(leaves)
            token, _, leaves = ops.offload(pool, token, leaves, ids[2:], at[2:], pages)
            x = jnp.tanh(x @ x)
            leaves = [jnp.zeros_like(leaf) for leaf in leaves]
            token, status, leaves = ops.restore(pool, token, leaves, ids, at, pages)
            return token, status, leaves, x

        token, x = pool.token(), jnp.eye(512)
        for run_number in range(5):
            ids = some_ids(run_number, 4)
            token, status, leaves, x = run(token, leaves, ids, x)
            expected = np.zeros_like(words)
            expected[ids[:2]] = words[ids[:2]]
            expected[ids[2:]] = decoded(words)[ids[2:]]
            words = expected
            assert int(status[StatusEntry.MOVED]) == 4
            assert_same_bytes(words_of(leaves), words)
        pool.free_slots(slots)


def test_a_program_may_go_on_after_its_pool_was_closed() -> None:
    """It is under way when the pool is closed; what it still has to do there is done, or refused."""
    leaves, words, pages = word_leaves()
    pool = HostPool(1 * MIB)
    pin_pool(pool)
    ids = np.arange(NUM_BLOCKS, dtype=np.int32)
    at, token = ids * (pages.record_bytes // 512), pool.token()

    @partial(jax.jit, donate_argnums=1)
    def run(token: jax.Array, leaves: list[jax.Array], x: jax.Array) -> Any:
        for _ in range(10):
            token, _, leaves = ops.offload(
                pool, token, leaves, np.arange(NUM_BLOCKS, dtype=np.int32), at, pages
            )
            x = jnp.tanh(x @ x)
        return token, leaves, x

    x = jnp.eye(2048)
    jax.block_until_ready(run(token, word_leaves()[0], x))
    _, leaves, _ = run(token, leaves, x)
    pool.close()
    assert_same_bytes(words_of(leaves), words)
