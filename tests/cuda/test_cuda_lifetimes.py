"""Pools, caches and transfers that end at awkward times."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from fresh_process import run_scenario
from word_caches import GROUP, canonical_of, held, make_caches, on_host

from jaxkv.errors import CacheMismatchError, PoolClosedError, PoolInUseError
from jaxkv.host_pool import HostPool
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer, Ticket
from jaxkv.transfer.checks import make_entries
from jaxkv.transfer.ticket import Move

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20
CLOSED = "host pool closed, unknown or of another process"


def test_a_pool_closed_under_an_offload_lives_until_that_has_ended(path: str) -> None:
    pool = HostPool(64 * MIB)
    caches = make_caches(4, 56, 256 * KIB)
    words = on_host(caches)
    transfer = BlockTransfer(canonical_of(caches), pool)
    with transfer.reserve(GROUP, 56) as lease:
        slots = lease.keep()
    views = [pool.view(slot) for slot in slots]
    ticket = transfer.offload(caches, GROUP, range(56), slots)
    with pytest.raises(PoolInUseError):
        pool.close()
    error = ticket.wait().error
    if error is None:
        assert_same_bytes(b"".join(bytes(view) for view in views), words.tobytes())
    else:
        assert CLOSED in error
    with pytest.raises(PoolClosedError):
        transfer.offload(caches, GROUP, range(56), slots)
    assert_same_bytes(on_host(caches), words)


def test_a_pool_closed_under_a_restore_leaves_the_caches_alive(path: str) -> None:
    pool = HostPool(64 * MIB)
    caches, target = make_caches(4, 56, 256 * KIB, seed=1), make_caches(4, 56, 256 * KIB, seed=2)
    words, others = on_host(caches), on_host(target)
    transfer = BlockTransfer(canonical_of(caches), pool)
    with transfer.reserve(GROUP, 56) as lease:
        slots = lease.keep()
    transfer.offload(caches, GROUP, range(56), slots)
    restored, ticket = transfer.restore(target, GROUP, range(56), slots)
    with pytest.raises(PoolInUseError):
        pool.close()
    error = ticket.wait().error
    assert error is None or CLOSED in error
    assert_same_bytes(on_host(dict(restored)), words if error is None else others)


def test_a_pool_closed_between_check_and_copy_fails_the_transfer_and_not_the_caches(path: str) -> None:
    caches = make_caches(2, 8, 4 * KIB)
    words, canonical = on_host(caches), canonical_of(caches)
    doomed = HostPool(1 * MIB)
    mover: Any = BlockTransfer(canonical, doomed).movers[0].mover
    call = (int(doomed.token()[0]), 2**31 - 1)
    entries = make_entries(np.arange(3), np.array([0, 16, 32]), canonical.groups[0].record_bytes, 1, 0, call)
    doomed.close()
    leaves = canonical.group_leaves(caches, GROUP)
    out = Move(mover.offload(leaves, entries), entries, 1).read()
    assert out.error is not None
    assert CLOSED in out.error
    leaves, status = mover.restore(leaves, entries)
    back = Move(status, entries, 1).read()
    assert (back.num_bytes, back.error) == (0, out.error)
    assert_same_bytes(on_host(dict(zip(caches, leaves, strict=True))), words)


def test_a_transfer_called_off_before_its_program_runs_moves_nothing(path: str, engine: Any) -> None:
    with HostPool(1 * MIB) as pool:
        caches = make_caches(2, 8, 4 * KIB)
        words, canonical = on_host(caches), canonical_of(caches)
        mover: Any = BlockTransfer(canonical, pool).movers[0].mover
        number = 2**31 - 2
        call, pages = (int(pool.token()[0]), number), canonical.groups[0]
        entries = make_entries(np.arange(3), np.array([0, 16, 32]), pages.record_bytes, 1, 0, call)
        leaves = canonical.group_leaves(caches, GROUP)
        engine.cancel(number)
        result = Move(mover.offload(leaves, entries), entries, pages.block_bytes).read()
        assert (result.cancelled, result.num_bytes) == (True, 0)
        assert not pool.arena_bytes().any()
        engine.cancel(number)
        leaves, status = mover.restore(leaves, entries)
        assert Move(status, entries, pages.block_bytes).read().cancelled
        assert_same_bytes(on_host(dict(zip(caches, leaves, strict=True))), words)
        # That the number was forgotten shows in a transfer of the same one.
        result = Move(mover.offload(leaves, entries), entries, pages.block_bytes).read()
        assert result.error is None
        assert_same_bytes(pool.arena_bytes()[: 3 * pages.record_bytes], words[:3])


def test_transfers_called_off_at_once_are_whole_or_not_begun(path: str) -> None:
    with HostPool(64 * MIB) as pool:
        caches = make_caches(2, 40, 128 * KIB)
        words = on_host(caches)
        transfer = BlockTransfer(canonical_of(caches), pool)
        for _ in range(20):
            with transfer.reserve(GROUP, 40) as slots:
                assert transfer.offload(caches, GROUP, range(40), slots).wait().error is None
                again = transfer.offload(caches, GROUP, range(40), slots)
                again.cancel()
                restored, load = transfer.restore(caches, GROUP, range(40), slots)
                load.cancel()
                for ticket in (again, load):
                    result = ticket.wait()
                    assert result.error is None or result.cancelled
                caches = dict(restored)
                assert_same_bytes(held(pool, slots), words.tobytes())
        assert_same_bytes(on_host(caches), words)
        assert pool.used_bytes == 0


def test_a_leaf_that_dlpack_holds_is_refused_and_the_caches_live_on(path: str) -> None:
    with HostPool(4 * MIB) as pool:
        caches, others = make_caches(2, 16, 16 * KIB, seed=1), make_caches(2, 16, 16 * KIB, seed=2)
        words, target_words = on_host(caches), on_host(others)
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 10) as slots:
            transfer.offload(caches, GROUP, range(10), slots)
            view = jax.dlpack.from_dlpack(others["layers.0"])
            with pytest.raises(CacheMismatchError, match="something else still uses it"):
                transfer.restore(others, GROUP, range(6, 16), slots)
            assert_same_bytes(on_host(others), target_words)
            del view
            restored, ticket = transfer.restore(others, GROUP, range(6, 16), slots)
            assert ticket.wait().error is None
            target_words[6:] = words[:10]
            assert_same_bytes(on_host(dict(restored)), target_words)


def test_tickets_that_nobody_keeps_end_all_the_same(path: str) -> None:
    with HostPool(8 * MIB) as pool:
        caches = make_caches(2, 16, 16 * KIB)
        transfer = BlockTransfer(canonical_of(caches), pool)
        for _ in range(100):
            with transfer.reserve(GROUP, 10) as slots:
                transfer.offload(caches, GROUP, range(10), slots)
        last: Ticket = transfer.offload(caches, GROUP, [], [])
        assert last.wait().error is None
        while pool.used_bytes:
            transfer.settle()


@pytest.mark.parametrize("name", ["ends_under_way", "ends_under_way_unpinned", "raises_under_way"])
@pytest.mark.parametrize("way", ["direct", "engine", "kernel"])
def test_a_process_may_end_with_transfers_under_way(name: str, way: str) -> None:
    run_scenario(name, JAXKV_CUDA_PATH=way, exit_status=3 if name == "raises_under_way" else 0)


def test_threads_may_be_the_first_to_use_a_device() -> None:
    run_scenario("first_used_by_threads")
