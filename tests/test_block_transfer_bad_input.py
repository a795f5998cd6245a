"""What a ``BlockTransfer`` refuses, with which message, and that refusing costs nobody anything."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.errors import (
    BlockIdError,
    CacheMismatchError,
    ConfigError,
    DeletedCacheError,
    NativeError,
    PoolClosedError,
    PoolInUseError,
    SlotError,
)
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing import assert_same_caches, layout_case, numpy_copy
from jaxkv.transfer import BlockTransfer

BACKENDS = ("cpu", "xla")


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(4 << 20) as opened:
        yield opened


def set_up(case: str, pool: HostPool, **options: Any) -> tuple[Any, CanonicalKVCaches, BlockTransfer]:
    chosen = layout_case(case)
    kv_caches = chosen.build(1)
    canonical = canonicalize(kv_caches, chosen.config, chosen.hints)
    return kv_caches, canonical, BlockTransfer(canonical, pool, **options)


def one_layer_groups(*names: str) -> tuple[dict[str, Any], CanonicalKVCaches]:
    """Layers of equal shape, each a group of its own."""
    spec = FullAttentionSpec(4, 2, 8, jnp.float32)
    config = KVCacheConfig(tuple(KVCacheGroupSpec((name,), spec, 16) for name in names))
    kv_caches = {name: jnp.full((16, 4, 4, 8), i + 1.0) for i, name in enumerate(names)}
    return kv_caches, canonicalize(kv_caches, config)


BAD_IDS = [
    ([11], r"block_ids\[0\] is 11, but the group has blocks 0 to 10"),
    ([0, -2], r"block_ids\[1\] is -2"),
    ([2**40], r"block_ids\[0\] is 1099511627776"),
    ([1.0], "whole numbers of shape"),
    ([[1]], "whole numbers of shape"),
    ([True], "whole numbers of shape"),
    ([[1], [2, 3]], "whole numbers of shape"),
    (None, "whole numbers of shape"),
    (["a"], "whole numbers of shape"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ids", "message"), BAD_IDS, ids=str)
def test_bad_block_ids_raise_and_leave_everything_usable(
    ids: Any, message: str, backend: str, pool: HostPool
) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool, backend=backend)
    expected = numpy_copy(kv_caches)
    with transfer.reserve(GroupId(0), 2) as slots:
        with pytest.raises(BlockIdError, match=message):
            transfer.offload(kv_caches, GroupId(0), ids, slots)
        with pytest.raises(BlockIdError, match=message):
            transfer.restore(kv_caches, GroupId(0), ids, slots)
        assert transfer.offload(kv_caches, GroupId(0), [0, 10], slots).wait().error is None
    assert_same_caches(kv_caches, expected)
    assert pool.used_bytes == 0


def test_a_block_named_twice_can_be_offloaded_but_not_restored(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool)
    with transfer.reserve(GroupId(0), 3) as slots:
        assert transfer.offload(kv_caches, GroupId(0), [4, -1, 4], slots).wait().error is None
        with pytest.raises(BlockIdError, match="block 4 is named twice in one restore"):
            transfer.restore(kv_caches, GroupId(0), [4, -1, 4], slots)
        restored, _ = transfer.restore(kv_caches, GroupId(0), [-1, -1, 4], slots)
    assert not any(leaf.is_deleted() for leaf in jax.tree_util.tree_leaves(restored))


def test_bad_slots_raise_before_anything_is_dispatched(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool, blocks_per_chunk=2)
    group = GroupId(0)
    (foreign,) = pool.reserve_slots(512, 1)
    with transfer.reserve(group, 2) as slots:
        for slots_given, first, message in (
            (slots[:1], 0, "3 blocks, counted .* need 2 slots of 2 blocks, got 1"),
            (slots, 2, "5 blocks, counted .* need 3 slots of 2 blocks, got 2"),
            ((slots[0], foreign), 0, "holds 512 bytes, a chunk of this group takes"),
        ):
            with pytest.raises(SlotError, match=message):
                transfer.offload(kv_caches, group, [0, 1, 2], slots_given, first_block=first)
            with pytest.raises(SlotError, match=message):
                transfer.restore(kv_caches, group, [0, 1, 2], slots_given, first_block=first)
        with pytest.raises(SlotError, match="named twice in one offload"):
            transfer.offload(kv_caches, group, [0, 1, 2], (slots[0], slots[0]))
        with pytest.raises(BlockIdError, match="cannot be -1"):
            transfer.offload(kv_caches, group, [0], slots, first_block=-1)
        stale = tuple(slots)
    with pytest.raises(SlotError, match="was freed"):
        transfer.restore(kv_caches, group, [0], stale)
    pool.free(foreign)
    assert not any(leaf.is_deleted() for leaf in jax.tree_util.tree_leaves(kv_caches))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_transfer_is_done_at_once(backend: str, pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool, backend=backend)
    assert transfer.offload(kv_caches, GroupId(0), [], ()).wait().num_bytes == 0
    kv_caches, ticket = transfer.restore(kv_caches, GroupId(0), [], ())
    assert (ticket.done(), ticket.wait().error) == (True, None)
    assert transfer.prefetch(GroupId(0), ()).wait().error is None


def test_deleted_caches_are_an_error(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool)
    with transfer.reserve(GroupId(0), 1) as slots:
        transfer.restore(kv_caches, GroupId(0), [0], slots)
        with pytest.raises(DeletedCacheError):
            transfer.offload(kv_caches, GroupId(0), [0], slots)


def test_one_array_for_two_leaves_cannot_be_restored(pool: HostPool) -> None:
    kv_caches, canonical = one_layer_groups("a", "b")
    transfer = BlockTransfer(canonical, pool)
    doubled = {"a": kv_caches["a"], "b": kv_caches["a"]}
    with transfer.reserve(GroupId(0), 1) as slots:
        # The groups share no leaf in the config: restoring one would delete the cache of the other.
        with pytest.raises(CacheMismatchError, match="one array stands for two cache leaves"):
            transfer.restore(doubled, GroupId(0), [0], slots)
        transfer.restore(kv_caches, GroupId(0), [0], slots)
    assert not kv_caches["b"].is_deleted()


def test_two_arrays_of_one_buffer_cannot_be_restored_and_stay(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("separate_kv", pool)
    key, _ = kv_caches["layers.0"]
    doubled = kv_caches | {"layers.0": (key, key.addressable_data(0))}
    with transfer.reserve(GroupId(0), 1) as slots:
        with pytest.raises(CacheMismatchError, match="two cache leaves share one buffer"):
            transfer.restore(doubled, GroupId(0), [0], slots)
        transfer.restore(kv_caches, GroupId(0), [0], slots)
    assert pool.used_bytes == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transfer_inside_jit_says_to_use_the_ops(backend: str, pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool, backend=backend)
    with transfer.reserve(GroupId(0), 1) as slots:
        with pytest.raises(CacheMismatchError, match=r"cannot be called inside jit; use jaxkv\.transfer"):
            jax.jit(lambda tree: transfer.restore(tree, GroupId(0), [0], slots)[0])(kv_caches)
        with pytest.raises(BlockIdError, match="must be concrete"):
            jax.jit(lambda ids: transfer.offload(kv_caches, GroupId(0), ids, slots))(jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("first_block", [1.0, "1", None, -1], ids=repr)
def test_a_first_block_that_is_none_is_an_error_and_pins_nothing(first_block: Any, pool: HostPool) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool, blocks_per_chunk=2)
    message = f"cannot be {first_block!r}"
    with transfer.reserve(GroupId(0), 1) as slots, pytest.raises(BlockIdError, match=message):
        transfer.offload(kv_caches, GroupId(0), [0], slots, first_block=first_block)
    assert pool.used_bytes == 0


def test_slots_are_given_back_when_a_transfer_dies_before_it_starts(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_caches, _, transfer = set_up("packed_kv", pool)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for part in ("jaxkv.transfer.block_transfer.make_entries", "jaxkv.transfer.cpu.CpuMover.offload"):
        with monkeypatch.context() as patched:
            patched.setattr(part, interrupt)
            with pytest.raises(KeyboardInterrupt), transfer.reserve(GroupId(0), 2) as slots:
                transfer.offload(kv_caches, GroupId(0), [0, 1], slots)
        assert pool.used_bytes == 0


def test_slots_released_together_stay_when_one_of_them_is_stale(pool: HostPool) -> None:
    _, _, transfer = set_up("packed_kv", pool)
    first, second = transfer.reserve(GroupId(0), 2).keep()
    with pytest.raises(SlotError, match="named twice"):
        transfer.release((first, second, first))
    transfer.release((first, second))
    assert pool.used_bytes == 0


def test_a_closed_pool_is_an_error_and_the_caches_stay(pool: HostPool) -> None:
    kv_caches, canonical = one_layer_groups("a")
    closing = HostPool(1 << 16)
    transfer = BlockTransfer(canonical, closing)
    slots = transfer.reserve(GroupId(0), 1).keep()
    with pytest.raises(PoolInUseError):
        closing.close()
    with pytest.raises(PoolClosedError):
        transfer.restore(kv_caches, GroupId(0), [0], slots)
    assert not kv_caches["a"].is_deleted()


def test_options_that_cannot_work_are_errors(pool: HostPool) -> None:
    _, canonical, transfer = set_up("packed_kv", pool)
    with pytest.raises(ConfigError, match="whole number of at least 1, got 0"):
        BlockTransfer(canonical, pool, blocks_per_chunk=0)
    with pytest.raises(ConfigError, match=r"whole number of at least 1, got 1\.5"):
        BlockTransfer(canonical, pool, blocks_per_chunk=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown backend 'tpu'"):
        BlockTransfer(canonical, pool, backend="tpu")
    if jax.default_backend() != "gpu":
        with pytest.raises(NativeError, match="CUDA"):
            BlockTransfer(canonical, pool, backend="cuda")
    with pytest.raises(ConfigError, match="no group 7; the caches have groups 0 to 0"):
        transfer.reserve(GroupId(7), 1)
    with HostPool(4096) as small, pytest.raises(ConfigError, match="cannot hold one slot"):
        BlockTransfer(canonical, small, blocks_per_chunk=100)


def test_a_forked_child_cannot_transfer_through_its_parents_pool() -> None:
    script = """
        import os, warnings
        import jax.numpy as jnp
        from jaxkv.canonical import canonicalize
        from jaxkv.errors import PoolForkedError
        from jaxkv.host_pool import HostPool
        from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from jaxkv.transfer import BlockTransfer

        caches = {"a": jnp.ones((4, 2, 2, 8))}
        config = KVCacheConfig((KVCacheGroupSpec(("a",), FullAttentionSpec(2, 1, 8, jnp.float32), 4),))
        pool = HostPool(1 << 16)
        transfer = BlockTransfer(canonicalize(caches, config), pool)
        slots = transfer.reserve(0, 1).keep()
        transfer.offload(caches, 0, [1], slots).wait()
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            try:
                transfer.offload(caches, 0, [2], slots)
            except PoolForkedError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert transfer.offload(caches, 0, [2], slots).wait().error is None
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_leaves_of_one_group_on_two_devices_are_an_error() -> None:
    script = """
        import jax, jax.numpy as jnp, pytest
        from jaxkv.canonical import canonicalize
        from jaxkv.errors import CacheMismatchError
        from jaxkv.host_pool import HostPool
        from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from jaxkv.transfer import BlockTransfer

        first, second = jax.devices("cpu")
        caches = {name: jnp.ones((4, 2, 2, 8)) for name in "ab"}
        spec = FullAttentionSpec(2, 1, 8, jnp.float32)
        config = KVCacheConfig((KVCacheGroupSpec(("a", "b"), spec, 4),))
        with HostPool(1 << 16) as pool:
            transfer = BlockTransfer(canonicalize(caches, config), pool)
            mixed = caches | {"b": jax.device_put(caches["b"], second)}
            with transfer.reserve(0, 1) as slots:
                with pytest.raises(CacheMismatchError, match="one group lie on 2 devices"):
                    transfer.restore(mixed, 0, [0], slots)
                moved, _ = transfer.restore(jax.device_put(caches, second), 0, [0], slots)
            assert moved["a"].device == second
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], check=True, timeout=300, env=environment
    )
