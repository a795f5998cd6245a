"""Transfers that nobody waits for, between steps that rewrite, donate and free the caches."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_caches import GROUP, DecodeLoop, canonical_of, decode, decoded, held, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20


def test_every_step_offloads_what_it_wrote_although_the_next_one_rewrites_it(path: str) -> None:
    with HostPool(400 * MIB) as pool:
        loop = DecodeLoop(pool, num_blocks=32, num_offloaded=8)
        loop.run(num_steps=80, num_leaves=8, page_bytes=64 * KIB)
        loop.check()


@pytest.mark.parametrize("lag", [1, 4])
def test_restores_between_offloads_bring_back_what_an_earlier_step_offloaded(lag: int, path: str) -> None:
    with HostPool(100 * MIB) as pool:
        loop = DecodeLoop(pool, num_blocks=24, num_offloaded=6, lag=lag)
        loop.run(num_steps=100, num_leaves=4, page_bytes=16 * KIB)
        loop.check()


def test_small_records_by_the_hundred_keep_their_order(path: str) -> None:
    with HostPool(100 * MIB) as pool:
        loop = DecodeLoop(pool, num_blocks=600, num_offloaded=300, lag=3)
        loop.run(num_steps=60, num_leaves=2, page_bytes=512)
        loop.check()


def test_threads_move_blocks_of_their_own_caches_through_one_pool(path: str) -> None:
    with HostPool(200 * MIB) as pool:
        loops = [DecodeLoop(pool, num_blocks=24, num_offloaded=5, lag=2, seed=seed) for seed in range(4)]
        threads = [threading.Thread(target=loop.run, args=(60, 3, 32 * KIB)) for loop in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for loop in loops:
            assert len(loop.slots) == 60
            loop.check()


def test_caches_may_be_freed_as_soon_as_an_offload_has_begun(path: str) -> None:
    with HostPool(64 * MIB) as pool:
        caches = make_caches(4, 64, 256 * KIB)
        words = on_host(caches)
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 60) as slots:
            ticket = transfer.offload(caches, GROUP, range(60), slots)
            shapes = {name: leaf.shape for name, leaf in caches.items()}
            del caches
            # The allocator gives out the same memory again.
            others = [jnp.full(shape, 7, jnp.uint32) for shape in shapes.values() for _ in range(3)]
            assert ticket.wait().error is None
            assert_same_bytes(held(pool, slots), words[:60].tobytes())
        assert all(int(other.ravel()[-1]) == 7 for other in others)


def test_a_step_sees_restored_blocks_without_anybody_waiting(path: str) -> None:
    with HostPool(64 * MIB) as pool:
        source, target = make_caches(4, 32, 256 * KIB, seed=1), make_caches(4, 32, 256 * KIB, seed=2)
        words, expected = on_host(source), on_host(target)
        transfer = BlockTransfer(canonical_of(source), pool)
        with transfer.reserve(GROUP, 30) as slots:
            transfer.offload(source, GROUP, range(30), slots)
            restored, ticket = transfer.restore(target, GROUP, range(2, 32), slots)
            stepped = decode(dict(restored))
            expected[2:32] = words[:30]
            assert_same_bytes(on_host(stepped), decoded(expected))
            assert ticket.wait().error is None


def test_slots_are_written_again_only_after_they_were_read(path: str) -> None:
    with HostPool(64 * MIB) as pool:
        caches, others = make_caches(4, 32, 256 * KIB, seed=1), make_caches(4, 32, 256 * KIB, seed=2)
        words, other_words = on_host(caches), on_host(others)
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 30) as slots:
            transfer.offload(caches, GROUP, range(30), slots)
            restored, load = transfer.restore(make_caches(4, 32, 256 * KIB, seed=3), GROUP, range(30), slots)
            store = transfer.offload(others, GROUP, range(2, 32), slots)
            assert load.wait().error is None
            assert store.wait().error is None
            assert_same_bytes(on_host(dict(restored))[:30], words[:30])
            assert_same_bytes(held(pool, slots), other_words[2:].tobytes())


def test_memory_of_slots_released_during_a_restore_is_given_out_after_it(path: str) -> None:
    with HostPool(32 * MIB) as pool:
        caches = make_caches(4, 40, 256 * KIB)
        words = on_host(caches)
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 30) as lease:
            slots = lease.keep()
        assert transfer.offload(caches, GROUP, range(30), slots).wait().error is None
        restored, ticket = transfer.restore(make_caches(4, 40, 256 * KIB, seed=1), GROUP, range(30), slots)
        transfer.release(slots)
        taken = []
        while len(taken) < 30:
            transfer.settle()
            slot = pool.try_reserve(slots.num_bytes)
            if slot is not None:
                np.asarray(pool.view(slot))[:] = 0xAA
                taken.append(slot)
        assert ticket.done()
        assert_same_bytes(on_host(dict(restored))[:30], words[:30])
        for slot in taken:
            pool.free(slot)


def test_a_transfer_of_caches_still_being_computed_waits_for_them(path: str) -> None:
    @jax.jit
    def slow_caches(seed: jax.Array) -> dict[str, jax.Array]:
        def body(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ x)

        mixed = jax.lax.fori_loop(0, 200, body, jnp.eye(1024) * seed)
        nothing = (mixed[0, 0] > 2).astype(jnp.uint32)  # which the compiler cannot know
        return {name: leaf + nothing for name, leaf in make_caches(2, 32, 64 * KIB).items()}

    with HostPool(16 * MIB) as pool:
        wanted = on_host(slow_caches(jnp.float32(1)))
        caches = slow_caches(jnp.float32(2))
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 32) as slots:
            ticket = transfer.offload(caches, GROUP, range(32), slots)
            assert ticket.wait().error is None
            assert_same_bytes(held(pool, slots), wanted.tobytes())
