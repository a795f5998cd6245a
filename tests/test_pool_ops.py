"""The pool ops inside a caller's own programs: how often they run, in which order, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.errors import BlockIdError
from jaxkv.host_pool import HostPool
from jaxkv.page_plan import PagePlan
from jaxkv.records import GroupPages, PagePlacement
from jaxkv.slots import Slot
from jaxkv.testing import assert_same_bytes
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import offload, ops, reference, restore
from jaxkv.transfer.cuda_device import pin_pool
from jaxkv.transfer.status import StatusEntry

NUM_BLOCKS = 6
PAGES = GroupPages(
    num_blocks=NUM_BLOCKS,
    placements=(
        PagePlacement(0, PagePlan(NUM_BLOCKS, block_stride=40, run_bytes=40)),
        PagePlacement(
            1,
            PagePlan(
                NUM_BLOCKS,
                block_stride=8,
                run_bytes=8,
                record_offset=40,
                outer_count=3,
                outer_leaf_stride=8 * NUM_BLOCKS,
                outer_page_stride=8,
            ),
        ),
    ),
    leaves=(0, 1),
    leaf_shapes=((NUM_BLOCKS, 10), (3, NUM_BLOCKS, 4)),
    block_axes=((0,), (1,)),
    block_bytes=64,
    record_bytes=512,
    clear_from=64,
)
NUM_SLOTS = 8


pytestmark = pytest.mark.usefixtures("platform")


@pytest.fixture
def open_pool(platform: str) -> Callable[[], HostPool]:
    """Opens pools that the platform's programs reach."""

    def open_one() -> HostPool:
        opened = HostPool(1 << 16)
        if platform == "gpu":
            pin_pool(opened)
        return opened

    return open_one


@pytest.fixture
def pool(open_pool: Callable[[], HostPool]) -> Iterator[HostPool]:
    with open_pool() as opened:
        yield opened


@pytest.fixture
def slots(pool: HostPool) -> Iterator[list[Slot]]:
    reserved = pool.reserve_slots(PAGES.record_bytes, NUM_SLOTS)
    yield reserved
    if not pool.closed:
        for slot in reserved:
            pool.free(slot)


def leaves_of(seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 2**32, (NUM_BLOCKS, 10), dtype=np.uint32)
    heads = rng.integers(0, 2**16, (3, NUM_BLOCKS, 4), dtype=np.uint16)
    return [jnp.array(rows).view(jnp.float32), jnp.array(heads).view(jnp.bfloat16)]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def addresses_of(pool: HostPool, slots: list[Slot]) -> np.ndarray:
    return ids(*(pool.address(slot) for slot in slots))


def counts(status: Any) -> dict[str, int]:
    named = zip(StatusEntry, np.array(status), strict=True)
    return {entry.name: int(n) for entry, n in named if n and entry < StatusEntry.FIRST_REFUSED}


def record(leaves: list[jax.Array], block: int) -> np.ndarray:
    return reference.gather_pages([as_bytes(leaf).copy() for leaf in leaves], ids(block), PAGES)[0]


def test_both_ops_equal_the_reference_byte_for_byte_also_where_entries_are_refused(
    pool: HostPool, slots: list[Slot]
) -> None:
    source, target = leaves_of(1), leaves_of(2)
    memory = pool.arena_bytes()
    memory[:] = np.random.default_rng(3).integers(0, 256, memory.size, dtype=np.uint8)
    expected_memory = memory.copy()
    at = addresses_of(pool, slots)
    at[6], at[7] = -1, memory.size // 512
    blocks = ids(5, -1, 0, 6, -2, 3, 1, 2)

    _, status, same = jax.jit(lambda t, *xs: offload(pool, t, xs, blocks, at, PAGES))(pool.token(), *source)
    host = [as_bytes(leaf).copy() for leaf in source]
    expected = reference.offload(expected_memory, host, blocks, at, PAGES)
    assert status[: StatusEntry.ELAPSED_US].tolist() == expected[: StatusEntry.ELAPSED_US].tolist()
    assert counts(status) == {"MOVED": 3, "BAD_BLOCK": 2, "BAD_ADDRESS": 2}
    assert_same_bytes(memory, expected_memory)
    for leaf, old in zip(same, source, strict=True):
        assert_same_bytes(leaf, old)

    into = ids(4, 4, 0, 6, -1, 2, 1, 3)
    _, status, written = jax.jit(lambda t, *xs: restore(pool, t, xs, into, at, PAGES))(pool.token(), *target)
    host = [as_bytes(leaf).copy() for leaf in target]
    expected = reference.restore(expected_memory, host, into, at, PAGES)
    assert status[: StatusEntry.ELAPSED_US].tolist() == expected[: StatusEntry.ELAPSED_US].tolist()
    assert counts(status) == {"MOVED": 3, "BAD_BLOCK": 1, "BAD_ADDRESS": 2, "REPEATED": 1}
    for leaf, wanted in zip(written, host, strict=True):
        assert_same_bytes(leaf, wanted)
    assert_same_bytes(memory, expected_memory)


def test_an_offload_happens_although_only_its_token_is_used(pool: HostPool, slots: list[Slot]) -> None:
    leaves = leaves_of(1)
    at = addresses_of(pool, slots[:1])

    @jax.jit
    def step(token: jax.Array, *xs: jax.Array) -> jax.Array:
        token, _, _ = offload(pool, token, xs, ids(2), at, PAGES)
        return token

    step(pool.token(), *leaves).block_until_ready()
    assert_same_bytes(pool.view(slots[0]), record(leaves, 2))


def test_two_identical_ops_both_run(pool: HostPool, slots: list[Slot]) -> None:
    at = addresses_of(pool, slots[:1])

    @jax.jit
    def step(token: jax.Array, *xs: jax.Array) -> Any:
        token, first, leaves = restore(pool, token, xs, ids(2), at, PAGES)
        # What lies between them changes the block, so that only a second run can bring the record back.
        leaves = [jnp.zeros_like(leaf) for leaf in leaves]
        token, second, leaves = restore(pool, token, leaves, ids(2), at, PAGES)
        return leaves, first, second

    source = leaves_of(1)
    np.asarray(pool.view(slots[0]))[:] = record(source, 2)
    leaves, first, second = step(pool.token(), *leaves_of(2))
    assert counts(first) == counts(second) == {"MOVED": 1}
    assert_same_bytes(record(leaves, 2), record(source, 2))
    assert not record(leaves, 1).any()


def test_two_offloads_of_the_same_arrays_both_run_in_token_order(pool: HostPool, slots: list[Slot]) -> None:
    at = addresses_of(pool, slots[:1])

    @jax.jit
    def step(token: jax.Array, *xs: jax.Array) -> Any:
        for block in (4, 1, 3):
            token, _, xs = offload(pool, token, xs, ids(block), at, PAGES)
        return token

    leaves = leaves_of(1)
    step(pool.token(), *leaves).block_until_ready()
    assert_same_bytes(pool.view(slots[0]), record(leaves, 3))


def test_a_scan_of_five_steps_runs_five_offloads(pool: HostPool, slots: list[Slot]) -> None:
    at = addresses_of(pool, slots[:5])

    @jax.jit
    def run(token: jax.Array, *xs: jax.Array) -> Any:
        def step(carry: Any, address: jax.Array) -> Any:
            token, leaves = carry
            token, status, leaves = offload(pool, token, leaves, ids(2), address[None], PAGES)
            leaves = [jnp.roll(leaf, 1) for leaf in leaves]
            return (token, leaves), status

        return jax.lax.scan(step, (token, list(xs)), at)

    leaves = leaves_of(1)
    (_, _), statuses = run(pool.token(), *leaves)
    assert statuses[:, StatusEntry.MOVED].tolist() == [1] * 5
    for slot in slots[:5]:
        assert_same_bytes(pool.view(slot), record(leaves, 2))
        leaves = [jnp.roll(leaf, 1) for leaf in leaves]


def test_a_scan_whose_ops_do_not_depend_on_the_step_is_not_hoisted(pool: HostPool, slots: list[Slot]) -> None:
    at = addresses_of(pool, slots[:1])

    @jax.jit
    def run(token: jax.Array, *xs: jax.Array) -> Any:
        def step(carry: Any, _: None) -> Any:
            token, leaves, total = carry
            token, status, leaves = restore(pool, token, leaves, ids(2), at, PAGES)
            leaves = [leaf.at[(2,) if leaf.shape[0] == NUM_BLOCKS else (0, 2)].set(0) for leaf in leaves]
            return (token, leaves, total + status[StatusEntry.MOVED]), record_now(leaves)

        def record_now(leaves: list[jax.Array]) -> jax.Array:
            return ops.gather_pages(leaves, ids(1), PAGES)

        return jax.lax.scan(step, (token, list(xs), jnp.int32(0)), None, length=5)

    (_, _, total), _ = run(pool.token(), *leaves_of(1))
    assert int(total) == 5


def test_leaves_of_an_offload_are_handed_on_without_a_copy_when_donated(
    pool: HostPool, slots: list[Slot]
) -> None:
    leaves = leaves_of(1)
    before = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    at = addresses_of(pool, slots[:1])
    step = jax.jit(lambda t, *xs: offload(pool, t, xs, ids(2), at, PAGES), donate_argnums=(1, 2))
    _, _, handed_on = step(pool.token(), *leaves)
    assert [leaf.unsafe_buffer_pointer() for leaf in handed_on] == before


def test_a_donated_cache_survives_every_refusal(pool: HostPool, slots: list[Slot]) -> None:
    at = addresses_of(pool, slots)
    step = jax.jit(lambda t, i, a, *xs: restore(pool, t, xs, i, a, PAGES), donate_argnums=(3, 4))
    before = [as_bytes(leaf).copy() for leaf in leaves_of(1)]
    bad_ids = np.full(NUM_SLOTS, 2**31 - 1, np.int32)
    bad_addresses = np.full(NUM_SLOTS, -(2**31), np.int32)
    foreign_token = pool.token() + 1
    cases = [
        (pool.token(), bad_ids, at, "BAD_BLOCK"),
        (pool.token(), -bad_ids, at, "BAD_BLOCK"),
        (pool.token(), np.arange(6, dtype=np.int32), bad_addresses[:6], "BAD_ADDRESS"),
        (foreign_token, np.arange(6, dtype=np.int32), at[:6], "NO_POOL"),
        (pool.token(), np.arange(6, dtype=np.int32), at, "BAD_GEOMETRY"),
    ]
    leaves = leaves_of(1)
    for token, blocks, addresses, reason in cases:
        _, status, leaves = step(token, blocks, addresses, *leaves)
        assert counts(status) == {reason: len(blocks)}
        assert status[StatusEntry.FIRST_REFUSED] == 0
    for leaf, old in zip(leaves, before, strict=True):
        assert_same_bytes(leaf, old)


def test_a_program_compiled_for_a_closed_pool_does_not_touch_the_pool_that_took_its_number(
    open_pool: Callable[[], HostPool],
) -> None:
    first = open_pool()
    token = first.token()
    step = jax.jit(lambda t, *xs: offload(first, t, xs, ids(1), ids(0), PAGES))
    _, status, _ = step(token, *leaves_of(1))
    assert counts(status) == {"MOVED": 1}
    number = first.pool_id
    first.close()
    _, status, _ = step(token, *leaves_of(1))
    assert counts(status) == {"NO_POOL": 1}
    with open_pool() as second:
        assert second.pool_id == number
        _, status, _ = step(token, *leaves_of(1))
        assert counts(status) == {"NO_POOL": 1}
        assert not second.arena_bytes().any()


@pytest.mark.parametrize("token", [np.zeros(0, np.int32), np.zeros(2, np.int32), np.zeros((), np.int32)])
def test_a_token_of_another_shape_is_an_error(token: np.ndarray, pool: HostPool) -> None:
    for op in (offload, restore):
        with pytest.raises(BlockIdError, match="token must be int32 of shape"):
            op(pool, token, leaves_of(1), ids(0), ids(0), PAGES)


def test_grad_and_vmap_are_refused_when_they_are_traced(pool: HostPool) -> None:
    def total(leaf: jax.Array) -> jax.Array:
        return ops.gather_pages([leaf, leaves_of(1)[1]], ids(0), PAGES).astype(jnp.float32).sum()

    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(total)(leaves_of(1)[0])
    with pytest.raises(NotImplementedError, match="vmap is only supported"):
        jax.vmap(lambda token: offload(pool, token, leaves_of(1), ids(0), ids(0), PAGES))(pool.token()[None])
