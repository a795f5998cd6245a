"""Transfers that run beside the caller: what they read and write, whatever the caller does meanwhile."""

from __future__ import annotations

import gc
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_caches, numpy_copy
from jaxkv.transfer import BlockTransfer, cpu
from jaxkv.transfer.cpu import DETACHED_BYTES, CpuMover
from jaxkv.transfer.ticket import Move

GROUP = GroupId(0)
NUM_BLOCKS = 64
BLOCK_SHAPE = (2, 16, 4, 32)
BLOCK_BYTES = 4 * 2 * 16 * 4 * 32


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(64 << 20) as opened:
        yield opened


@pytest.fixture
def all_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DETACHED_BYTES", 0)


def make_caches(num_layers: int = 3) -> tuple[dict[str, jax.Array], CanonicalKVCaches]:
    names = tuple(f"layer.{i}" for i in range(num_layers))
    spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=32, dtype=np.dtype(np.float32))
    keys = jax.random.split(jax.random.key(0), num_layers)
    shape = (NUM_BLOCKS, *BLOCK_SHAPE)
    caches = {name: jax.random.normal(key, shape) for name, key in zip(names, keys, strict=True)}
    config = KVCacheConfig(groups=(KVCacheGroupSpec(names, spec, NUM_BLOCKS),))
    return caches, canonicalize(caches, config)


@pytest.mark.usefixtures("all_detached")
@pytest.mark.parametrize("seed", range(2))
def test_nothing_overtakes_a_transfer_in_a_loop_that_donates_its_caches(seed: int, pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    rng, expected = np.random.default_rng(seed), numpy_copy(kv_caches)
    step = jax.jit(lambda caches: jax.tree.map(lambda leaf: leaf * 2 + 1, caches), donate_argnums=0)
    held: dict[int, dict[str, np.ndarray]] = {}
    slots = transfer.reserve(GROUP, 32).keep()
    tickets = []
    for _ in range(40):
        count = int(rng.integers(1, 17))
        blocks, places = rng.permutation(NUM_BLOCKS)[:count], rng.permutation(32)[:count]
        if rng.random() < 0.5:
            tickets.append(transfer.offload(kv_caches, GROUP, blocks, [slots[int(p)] for p in places]))
            for block, place in zip(blocks, places, strict=True):
                held[int(place)] = {name: leaf[block].copy() for name, leaf in expected.items()}
        else:
            known = [place for place in places.tolist() if place in held]
            chosen = [slots[place] for place in known]
            kv_caches, ticket = transfer.restore(kv_caches, GROUP, blocks[: len(known)], chosen)
            tickets.append(ticket)
            for block, place in zip(blocks, known, strict=False):
                for name, leaf in expected.items():
                    leaf[block] = held[place][name]
        kv_caches = step(kv_caches)
        expected = {name: leaf * 2 + 1 for name, leaf in expected.items()}
    assert [ticket.wait().error for ticket in tickets] == [None] * len(tickets)
    assert_same_caches(kv_caches, expected)
    assert transfer.num_copied_leaves == 0
    transfer.release(slots)


def test_xla_counts_work_enough_to_take_large_transfers_off_the_callers_thread(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    mover, leaves = CpuMover(pool, canonical.groups[GROUP]), list(kv_caches.values())
    numbers = np.zeros(18, np.int32)
    for program, detached in (
        (mover.inline_read, False),
        (mover.inline_write, False),
        (mover.detached_read, True),
        (mover.detached_write, True),
    ):
        cost = program.lower(numbers, *leaves).compile().cost_analysis()
        assert (cost["flops"] >= 1000) == detached


def test_large_transfers_are_under_way_when_the_call_returns(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    assert NUM_BLOCKS * transfer.chunk_bytes(GROUP) > 8 * DETACHED_BYTES
    blocks = np.arange(NUM_BLOCKS)
    slots = transfer.reserve(GROUP, NUM_BLOCKS).keep()
    kv_caches = transfer.warm_up(kv_caches, NUM_BLOCKS)
    under_way = set()
    for _ in range(200):  # One that ends at once says nothing: the machine may have been busy elsewhere.
        ticket = transfer.offload(kv_caches, GROUP, blocks, slots)
        under_way |= set() if ticket.done() else {"offload"}
        ticket.wait()
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, blocks, slots)
        under_way |= set() if ticket.done() else {"restore"}
        ticket.wait()
        if len(under_way) == 2:
            break
    assert under_way == {"offload", "restore"}
    transfer.release(slots)


@pytest.mark.parametrize("num_blocks", [1, NUM_BLOCKS])
def test_profiles_name_transfers_and_their_programs(num_blocks: int, pool: HostPool, tmp_path: Path) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with transfer.reserve(GROUP, num_blocks) as slots, jax.profiler.trace(tmp_path, profiler_options=options):
        transfer.offload(kv_caches, GROUP, range(num_blocks), slots)
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, range(num_blocks), slots)
        ticket.wait()
    (profile,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(profile.read_bytes()))["traceEvents"]
    for name in ("jaxkv.offload", "jaxkv.restore"):
        spans = [event["args"] for event in events if event.get("name") == name]
        assert spans == [{"group": "0", "num_blocks": str(num_blocks)}]
    modules = {event.get("args", {}).get("hlo_module") for event in events}
    assert {"jit_jaxkv_offload", "jit_jaxkv_restore"} <= modules


@pytest.mark.usefixtures("all_detached")
def test_slots_freed_under_way_are_given_to_nobody_before_the_transfer_has_ended(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    kv_caches = transfer.warm_up(kv_caches, 4)
    late = {**kv_caches, "layer.0": late_copy(kv_caches["layer.0"])}
    slots = transfer.reserve(GROUP, 4).keep()
    ticket = transfer.offload(late, GROUP, range(4), slots)
    pool.free_slots(slots)
    others = pool.reserve_slots(transfer.chunk_bytes(GROUP), 4)
    assert not ticket.done()
    assert not set(others.offsets.tolist()) & set(slots.offsets.tolist())
    assert ticket.wait().error is None
    pool.free_slots(others)
    assert pool.used_bytes == 0


@pytest.mark.usefixtures("all_detached")
def test_a_transfer_called_off_before_it_began_moves_nothing_and_says_so(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    expected = numpy_copy(kv_caches)
    kv_caches = transfer.warm_up(kv_caches, 4)
    with transfer.reserve(GROUP, 4) as slots:
        for slot in slots:
            pool.view(slot)[:] = bytes([7]) * slot.num_bytes
        late = {**kv_caches, "layer.0": late_copy(kv_caches["layer.0"])}
        written = transfer.offload(late, GROUP, range(4), slots)
        late, read = transfer.restore(late, GROUP, range(4), slots)
        written.cancel()
        read.cancel()
        for ticket in (written, read):
            result = ticket.wait()
            assert (result.num_bytes, result.cancelled) == (0, True)
            assert result.error is not None
            assert "4 x cancelled before it began" in result.error
        assert all(bytes(pool.view(slot)) == bytes([7]) * slot.num_bytes for slot in slots)
        assert_same_caches(late, expected)
        _, after = transfer.restore(late, GROUP, range(4), slots)
        assert (after.wait().error, after.wait().cancelled) == (None, False)
        after.cancel()
        assert after.wait().error is None


@pytest.mark.usefixtures("all_detached")
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_layer_by_layer_the_same_bytes_come_back(case: LayoutCase, pool: HostPool) -> None:
    kv_caches, target = case.build(1), case.build(2)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    transfer = BlockTransfer(canonical, pool, layerwise=True)
    source, expected = numpy_copy(kv_caches), numpy_copy(target)
    for group in map(GroupId, range(len(canonical.groups))):
        ids = np.random.default_rng(1).permutation(canonical.groups[group].num_blocks)[:5]
        with transfer.reserve(group, len(ids)) as slots:
            transfer.offload(kv_caches, group, ids, slots)
            target, ticket = transfer.restore(target, group, ids[::-1], slots)
            result = ticket.wait()
            assert result.error is None
            assert result.num_bytes == len(ids) * canonical.groups[group].block_bytes
            for block, place in zip(ids, ids[::-1], strict=True):
                case.poke(expected, group, int(place), case.oracle(source, group, int(block)))
    assert_same_caches(target, expected)
    assert transfer.num_copied_leaves == 0


@pytest.mark.usefixtures("all_detached")
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_layer_is_there_before_the_next_only_if_loads_go_layer_by_layer(
    layerwise: bool, pool: HostPool
) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool, layerwise=layerwise)
    kv_caches = transfer.warm_up(kv_caches, 4)
    slots = transfer.reserve(GROUP, 4).keep()
    transfer.offload(kv_caches, GROUP, range(4), slots).wait()
    late = {**kv_caches, "layer.2": late_copy(kv_caches["layer.2"])}
    restored, ticket = transfer.restore(late, GROUP, range(4), slots)
    for name in ("layer.0", "layer.1"):  # XLA may say so of the second before it does of the first.
        restored[name].block_until_ready()
    assert restored["layer.2"].is_ready() != layerwise
    assert ticket.wait().error is None
    transfer.release(slots)


@pytest.mark.usefixtures("all_detached")
@pytest.mark.parametrize("launched_by", ["the launcher of layers", "another thread"])
def test_slots_still_being_written_are_read_afterwards_by_another_thread(
    launched_by: str, pool: HostPool
) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool, layerwise=launched_by == "the launcher of layers")
    kv_caches = transfer.warm_up(kv_caches, 4)
    target = jax.tree.map(jnp.zeros_like, kv_caches)
    with transfer.reserve(GROUP, 4) as slots, ThreadPoolExecutor(1) as threads:
        transfer.offload(target, GROUP, range(4), slots).wait()
        late = {**kv_caches, "layer.0": late_copy(kv_caches["layer.0"])}
        transfer.offload(late, GROUP, range(4), slots)
        if launched_by == "another thread":
            target, _ = threads.submit(transfer.restore, target, GROUP, range(4), slots).result()
        else:
            target, _ = transfer.restore(target, GROUP, range(4), slots)
        for name, leaf in kv_caches.items():
            assert np.array_equal(target[name][:4], leaf[:4])


@pytest.mark.usefixtures("all_detached")
def test_slots_still_being_read_are_written_afterwards_by_another_thread(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool, layerwise=True)
    kv_caches = transfer.warm_up(kv_caches, 4)
    zeros = jax.tree.map(jnp.zeros_like, kv_caches)
    target = jax.tree.map(jnp.zeros_like, kv_caches)
    with transfer.reserve(GROUP, 4) as slots:
        transfer.offload(kv_caches, GROUP, range(4), slots).wait()
        late = {**target, "layer.0": late_copy(target["layer.0"])}
        late, _ = transfer.restore(late, GROUP, range(4), slots)
        transfer.offload(zeros, GROUP, range(4), slots).wait()
        for name, leaf in kv_caches.items():
            assert np.array_equal(late[name][:4], leaf[:4])


@pytest.mark.usefixtures("all_detached")
def test_slots_are_read_after_another_transfer_of_the_pool_has_written_them(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    writer, reader = BlockTransfer(canonical, pool), BlockTransfer(canonical, pool, layerwise=True)
    kv_caches = writer.warm_up(kv_caches, 4)
    target = reader.warm_up(jax.tree.map(jnp.zeros_like, kv_caches), 4)
    with writer.reserve(GROUP, 4) as slots:
        writer.offload(target, GROUP, range(4), slots).wait()
        late = {**kv_caches, "layer.0": late_copy(kv_caches["layer.0"])}
        writer.offload(late, GROUP, range(4), slots)
        target, _ = reader.restore(target, GROUP, range(4), slots)
        for name, leaf in kv_caches.items():
            assert np.array_equal(target[name][:4], leaf[:4])


@pytest.mark.usefixtures("all_detached")
def test_slots_of_a_transfer_nobody_holds_come_back_when_it_has_ended(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    kv_caches = transfer.warm_up(kv_caches, 4)
    late = {**kv_caches, "layer.0": late_copy(kv_caches["layer.0"])}
    slots = transfer.reserve(GROUP, 4).keep()
    transfer.offload(late, GROUP, range(4), slots)
    transfer.release(slots)
    del transfer
    gc.collect()
    assert pool.used_bytes > 0
    after = BlockTransfer(canonical, pool)
    with after.reserve(GROUP, 4) as others:
        after.offload(late, GROUP, range(4), others).wait()  # One thread's programs run one by one.
    # XLA lets the next program begin before it says that this one is ready.
    deadline_s = time.monotonic() + 60
    while pool.used_bytes and time.monotonic() < deadline_s:
        after.settle()
    assert pool.used_bytes == 0


@pytest.mark.usefixtures("all_detached")
def test_an_interrupt_of_a_layer_by_layer_restore_waits_for_its_programs(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool, layerwise=True)
    read: list[int] = []
    read_move = Move.read
    monkeypatch.setattr(Move, "read", lambda move: (read.append(pool.used_bytes), read_move(move))[1])
    result = Future.result

    def interrupted(future: Future[Any], timeout: float | None = None) -> Any:
        monkeypatch.setattr(Future, "result", result)
        raise KeyboardInterrupt

    with transfer.reserve(GROUP, 4) as slots:
        transfer.offload(kv_caches, GROUP, range(4), slots).wait()
        read.clear()
        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transfer.restore(kv_caches, GROUP, range(4), slots)
        assert len(read) == len(kv_caches)
        assert all(read)
    assert pool.used_bytes == 0


@pytest.mark.usefixtures("all_detached")
def test_what_is_deleted_after_an_offload_was_read_before(pool: HostPool) -> None:
    kv_caches, canonical = make_caches()
    transfer = BlockTransfer(canonical, pool)
    expected = numpy_copy(kv_caches)
    with transfer.reserve(GROUP, NUM_BLOCKS) as slots:
        ticket = transfer.offload(kv_caches, GROUP, range(NUM_BLOCKS), slots)
        for leaf in kv_caches.values():
            leaf.delete()
        assert ticket.wait().error is None
        for block in (0, 31, NUM_BLOCKS - 1):
            pages = np.frombuffer(pool.view(slots[block]), np.float32).reshape(3, *BLOCK_SHAPE)
            assert pages.tobytes() == np.stack([leaf[block] for leaf in expected.values()]).tobytes()


@pytest.mark.usefixtures("all_detached")
def test_a_pool_closed_under_way_fails_the_transfer_or_serves_it_and_spares_the_caches() -> None:
    kv_caches, canonical = make_caches()
    expected = numpy_copy(kv_caches)
    for _ in range(10):
        doomed = HostPool(8 << 20)
        transfer = BlockTransfer(canonical, doomed)
        slots = doomed.reserve_slots(transfer.chunk_bytes(GROUP), 8)
        written = transfer.offload(kv_caches, GROUP, range(8), slots)
        kv_caches, read = transfer.restore(kv_caches, GROUP, range(8), slots)
        doomed._close_quietly()
        for ticket in (written, read):
            error = ticket.wait().error
            assert error is None or "host pool closed" in error
        if read.wait().error is None:
            assert written.wait().error is None
        assert_same_caches(kv_caches, expected)


def test_a_process_may_end_with_transfers_under_way() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from jaxkv.host_pool import HostPool
from jaxkv.transfer import BlockTransfer
from test_detached_transfers import GROUP, NUM_BLOCKS, make_caches
kv_caches, canonical = make_caches(8)
pool = HostPool(64 << 20)
transfer = BlockTransfer(canonical, pool)
slots = transfer.reserve(GROUP, NUM_BLOCKS).keep()
for _ in range(3):
    transfer.offload(kv_caches, GROUP, range(NUM_BLOCKS), slots)
    kv_caches, ticket = transfer.restore(kv_caches, GROUP, range(NUM_BLOCKS), slots)
print("started")
"""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "started\n"), ended.stderr


def late_copy(leaf: jax.Array) -> jax.Array:
    """``leaf``, after a second or so; transfers of it are queued until then."""
    matrix = jnp.ones((256, 256)) / 256

    @jax.jit
    def compute(leaf: jax.Array) -> jax.Array:
        total = jax.lax.fori_loop(0, 1500, lambda _, m: m @ matrix, matrix)
        return leaf + 0 * total[0, 0]

    compiled: Any = compute.lower(leaf).compile()
    late: jax.Array = compiled(leaf)
    assert not late.is_ready()
    return late
