"""Blocks offloaded and restored, byte for byte, over all layouts and backends that run here."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_moves import check_all_groups, check_chunks, many_leaves, pointers, set_up, some_blocks

from jaxkv import host_pool
from jaxkv import slots as slots_module
from jaxkv.errors import (
    SlotError,
)
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_caches, layout_case, numpy_copy
from jaxkv.transfer import BlockTransfer, Ticket, block_transfer, ops
from jaxkv.transfer.checks import Entries, make_entries
from jaxkv.transfer.cpu import CpuMover
from jaxkv.transfer.status import make_status
from jaxkv.transfer.ticket import Move

BACKENDS = ("cpu", "xla")
POOL_BYTES = 4 << 20


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(POOL_BYTES) as opened:
        yield opened


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_slots_and_restored_blocks_hold_the_bytes_the_oracle_finds_and_others_stay(
    case: LayoutCase, backend: str, pool: HostPool
) -> None:
    check_all_groups(case, pool, backend=backend)


def test_a_first_block_may_be_of_any_integer_type(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up(layout_case("packed_kv"), pool, blocks_per_chunk=3)
    with transfer.reserve(GroupId(0), 101) as slots:
        ids = [-1] * 297 + [4]
        result = transfer.offload(kv_caches, GroupId(0), ids, slots, first_block=np.uint8(5)).wait()
        assert (result.error, result.num_bytes) == (None, transfer.canonical.groups[0].block_bytes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_block", [0, 1, 2, 4])
def test_chunks_of_several_blocks_are_filled_from_any_start_and_skip_minus_one(
    backend: str, first_block: int, pool: HostPool
) -> None:
    check_chunks(pool, first_block, backend=backend)


@pytest.mark.parametrize("num_layers", [1, 60])
def test_restore_writes_in_place_and_consumes_the_old_arrays(num_layers: int, pool: HostPool) -> None:
    kv_caches, canonical = many_leaves(num_layers)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    before = pointers(kv_caches)
    with transfer.reserve(GroupId(0), 2) as slots:
        transfer.offload(kv_caches, GroupId(0), [3, 5], slots)
        assert pointers(kv_caches) == before
        restored, _ = transfer.restore(kv_caches, GroupId(0), [1, 2], slots)
    assert pointers(restored) == before
    assert all(leaf.is_deleted() for leaf in kv_caches.values())
    assert transfer.num_copied_leaves == 0


def programs_of(mover: Any) -> list[Any]:
    return [value for value in vars(mover).values() if hasattr(value, "_cache_size")]


def test_the_compiled_programs_copy_no_whole_leaf(pool: HostPool) -> None:
    kv_caches, canonical = many_leaves(3)
    mover = CpuMover(pool, canonical.groups[0])
    leaves = canonical.group_leaves(kv_caches, GroupId(0))
    for program in programs_of(mover):
        text = program.lower(np.zeros(18, np.int32), *leaves).compile().as_text()
        assert "f32[16,4,4,8]" in text
        copies = [line for line in text.splitlines() if " copy" in line and "f32[" in line]
        assert not copies
    ids = np.zeros(8, np.int32)
    undonated = jax.jit(lambda *xs: ops.restore(pool, xs[0], xs[3:], xs[1], xs[2], canonical.groups[0]))
    text = undonated.lower(pool.token(), ids, ids, *leaves).compile().as_text()
    assert any(" copy" in line and "f32[16,4,4,8]" in line for line in text.splitlines())


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ids_of_the_same_bucket_compile_nothing(backend: str, pool: HostPool) -> None:
    case = layout_case("packed_kv")
    kv_caches, _, transfer = set_up(case, pool, backend=backend)
    kv_caches = transfer.warm_up(kv_caches, max_blocks=10)
    mover = transfer.movers[0].mover
    sizes = [program._cache_size() for program in programs_of(mover)]
    assert max(sizes) == 2
    for seed in range(5):
        ids = np.random.default_rng(seed).permutation(11)[: 2 * seed + 2]
        with transfer.reserve(GroupId(0), len(ids)) as slots:
            transfer.offload(kv_caches, GroupId(0), ids.tolist(), slots)
            kv_caches, _ = transfer.restore(kv_caches, GroupId(0), ids, slots)
    assert [program._cache_size() for program in programs_of(mover)] == sizes


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_up_changes_no_byte(backend: str, pool: HostPool) -> None:
    case = layout_case("hybrid")
    kv_caches, _, transfer = set_up(case, pool, backend=backend)
    expected = numpy_copy(kv_caches)
    assert_same_caches(transfer.warm_up(kv_caches, max_blocks=9), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_keeps_its_bytes_over_many_restores(backend: str, pool: HostPool) -> None:
    case = layout_case("head_major")
    kv_caches, _, transfer = set_up(case, pool, backend=backend)
    host = numpy_copy(kv_caches)
    with transfer.reserve(GroupId(0), 1) as slots:
        transfer.offload(kv_caches, GroupId(0), [4], slots)
        for block in range(11):
            kv_caches, _ = transfer.restore(kv_caches, GroupId(0), [block], slots)
    after = numpy_copy(kv_caches)
    assert {case.oracle(after, 0, block) for block in range(11)} == {case.oracle(host, 0, 4)}


def test_a_numpy_view_of_a_leaf_is_reported_and_still_shows_the_old_bytes(
    pool: HostPool, caplog: pytest.LogCaptureFixture
) -> None:
    kv_caches, canonical = many_leaves(2)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    with transfer.reserve(GroupId(0), 1) as slots:
        transfer.offload(kv_caches, GroupId(0), [3], slots)
        view = np.asarray(kv_caches["layers.0"])
        before = view.copy()
        kv_caches, _ = transfer.restore(kv_caches, GroupId(0), [5], slots)
        assert "a restore copied 1 whole cache leaves" in caplog.text
        assert transfer.num_copied_leaves == 1
        assert np.array_equal(view, before)
        assert np.array_equal(np.array(kv_caches["layers.0"])[5], before[3])
        again, _ = transfer.restore(kv_caches, GroupId(0), [6], slots)
    assert transfer.num_copied_leaves == 1
    assert np.array_equal(np.array(again["layers.0"])[6], before[3])


def test_threads_offload_at_the_same_time_while_the_caches_move_on(pool: HostPool) -> None:
    case = layout_case("wide_pages")
    kv_caches, canonical, transfer = set_up(case, pool, backend="cpu")
    host = numpy_copy(kv_caches)
    pages = canonical.groups[0]
    wrong: list[int] = []

    def work(block: int) -> None:
        for _ in range(20):
            with transfer.reserve(GroupId(0), 1) as slots:
                ticket = transfer.offload(kv_caches, GroupId(0), [block], slots)
                result = ticket.wait()
                held = bytes(pool.view(slots[0]))[: pages.block_bytes]
                if result.error or held != case.oracle(host, 0, block):
                    wrong.append(block)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.used_bytes == 0


def test_an_offload_reads_what_was_there_although_the_next_step_donates_the_caches(pool: HostPool) -> None:
    case = layout_case("wide_pages")
    kv_caches, canonical, transfer = set_up(case, pool, backend="cpu")
    expected = numpy_copy(kv_caches)
    step = jax.jit(lambda tree: jax.tree_util.tree_map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    with transfer.reserve(GroupId(0), 11) as slots:
        ticket = transfer.offload(kv_caches, GroupId(0), range(11), slots)
        kv_caches = step(kv_caches)
        assert ticket.wait().error is None
        for block, slot in enumerate(slots):
            held = bytes(pool.view(slot))[: canonical.groups[0].block_bytes]
            assert held == case.oracle(expected, 0, block)


def test_an_offload_of_caches_still_being_computed_waits_for_them(pool: HostPool) -> None:
    kv_caches, canonical = many_leaves(2)
    transfer = BlockTransfer(canonical, pool, backend="cpu")

    @functools.partial(jax.jit, donate_argnums=0)
    def slow_step(tree: Any) -> Any:
        def body(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ x)

        one = jax.lax.fori_loop(0, 50, body, jnp.eye(400))[0, 0]
        return jax.tree_util.tree_map(lambda x: jnp.full_like(x, one), tree)

    expected = np.array(jax.tree_util.tree_leaves(slow_step(many_leaves(2)[0]))[0][0])
    with transfer.reserve(GroupId(0), 1) as slots:
        kv_caches = slow_step(kv_caches)
        ticket = transfer.offload(kv_caches, GroupId(0), [7], slots)
        kv_caches, load = transfer.restore(kv_caches, GroupId(0), [1], slots)
        assert ticket.wait().error is None
        assert load.wait().error is None
        held = np.frombuffer(pool.view(slots[0]), np.float32)[: expected.size]
        assert np.array_equal(held.reshape(expected.shape), expected)
        del held


# -- slots ----------------------------------------------------------------------------------------------


def test_kept_slots_stay_until_they_are_released(pool: HostPool) -> None:
    _, canonical, transfer = set_up(layout_case("packed_kv"), pool)
    with transfer.reserve(GroupId(0), 2) as lease:
        kept = lease.keep()
    assert pool.used_bytes == 2 * canonical.groups[0].record_bytes
    assert (len(lease), lease[0], lease[:1]) == (2, kept[0], kept[:1])
    transfer.release(kept)
    assert pool.used_bytes == 0
    with pytest.raises(SlotError, match="was freed"):
        transfer.release(kept)


@pytest.mark.parametrize("form", [lambda lease: lease, lambda lease: lease.keep(), list, tuple], ids=range(4))
def test_slots_in_any_form_are_the_same_chunks(form: Any, pool: HostPool) -> None:
    kv_caches, canonical, transfer = set_up(layout_case("packed_kv"), pool)
    ids = some_blocks(canonical.groups[0].num_blocks)
    before = numpy_copy(kv_caches)
    with transfer.reserve(GroupId(0), len(ids)) as lease:
        slots = form(lease)
        assert transfer.offload(kv_caches, GroupId(0), ids, slots).wait().error is None
        assert transfer.prefetch(GroupId(0), slots).wait().error is None
        kv_caches = jax.tree.map(jnp.zeros_like, kv_caches)
        kv_caches, ticket = transfer.restore(kv_caches, GroupId(0), ids, slots)
        assert ticket.wait().error is None
        restored = numpy_copy(kv_caches)
        transfer.release(slots)
        lease.keep()
    assert pool.used_bytes == 0
    for name, leaf in restored.items():
        assert leaf[ids].tobytes() == before[name][ids].tobytes()


def test_a_transfer_of_many_slots_makes_an_object_of_none(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_caches, canonical, transfer = set_up(layout_case("packed_kv"), pool)
    ids = some_blocks(canonical.groups[0].num_blocks)
    for module in (slots_module, host_pool, block_transfer):
        monkeypatch.delattr(module, "Slot")
    with transfer.reserve(GroupId(0), len(ids)) as slots:
        assert transfer.offload(kv_caches, GroupId(0), ids, slots).wait().error is None
        kv_caches, ticket = transfer.restore(kv_caches, GroupId(0), ids, slots[:])
        assert ticket.wait().error is None
        with pytest.raises(NameError):
            _ = slots[0]
    assert pool.used_bytes == 0


def test_a_slot_freed_during_its_transfer_comes_back_when_the_ticket_ends(pool: HostPool) -> None:
    (slot,) = pool.reserve_slots(512, 1)
    pool.pin([slot])
    move = Move(make_status(moved=1), Entries(np.zeros(4, np.int32), 1), 8)
    ticket = Ticket(GroupId(0), [move], lambda _: pool.unpin([slot]))
    pool.free(slot)
    assert pool.used_bytes == 512
    assert ticket.wait() == ticket.wait()
    assert pool.used_bytes == 0


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (make_status(moved=2), None),
        (
            make_status(moved=1, bad_address=1, first_refused=2),
            "group 3: blocks refused: 1 x record outside the pool or the staging array; "
            "the first is block_ids[2], block 5",
        ),
        (make_status(moved=1), "group 3: 1 blocks moved, 2 were asked for"),
    ],
)
def test_a_ticket_reports_bytes_and_what_was_refused(status: np.ndarray, error: str | None) -> None:
    numbers = np.array([0, 0, 7, -1, 5, -1, 0, 0, 0, 0], np.int32)
    move = Move(status, Entries(numbers, 2), 100)
    result = Ticket(GroupId(3), [move], lambda _: None).wait()
    assert result.num_bytes == 100 * status[0]
    assert result.error == error


def test_a_pool_closed_between_check_and_copy_fails_the_transfer_and_not_the_caches(pool: HostPool) -> None:
    kv_caches, canonical = many_leaves(2)
    expected = numpy_copy(kv_caches)
    doomed = HostPool(1 << 16)
    mover = CpuMover(doomed, canonical.groups[0])
    record_bytes, call = canonical.groups[0].record_bytes, (int(doomed.token()[0]), 0)
    entries = make_entries(np.arange(3), np.array([0, 8, 16]), record_bytes, 1, 0, call)
    doomed.close()
    leaves, status = mover.restore(canonical.group_leaves(kv_caches, GroupId(0)), entries)
    result = Ticket(GroupId(0), [Move(status, entries, 1)], lambda _: None).wait()
    assert result.num_bytes == 0
    assert result.error == (
        "group 0: blocks refused: 3 x host pool closed, unknown or of another process; "
        "the first is block_ids[0], block 0"
    )
    assert_same_caches(canonical.replace(kv_caches, GroupId(0), leaves), expected)
