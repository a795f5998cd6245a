"""The NumPy reference against the oracle that slices logical arrays and never sees a plan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.keys import GroupId
from jaxkv.records import GroupPages
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_bytes, numpy_copy
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import reference
from jaxkv.transfer.status import StatusEntry

ALL_GROUPS = [(case, GroupId(g)) for case in LAYOUT_CASES for g in range(len(case.config.groups))]


def name_of(value: Any) -> str:
    return f"group{value}" if isinstance(value, int) else str(value)


def flat_leaves(case: LayoutCase, group: GroupId, seed: int) -> tuple[Any, list[np.ndarray], GroupPages]:
    """Host caches, byte copies of the group's leaves, and the group's pages."""
    kv_caches = case.build(seed)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    leaves = [as_bytes(leaf).copy() for leaf in canonical.group_leaves(kv_caches, group)]
    return numpy_copy(kv_caches), leaves, canonical.groups[group]


@pytest.mark.parametrize(("case", "group"), ALL_GROUPS, ids=name_of)
def test_gathered_records_are_what_the_oracle_finds(case: LayoutCase, group: GroupId) -> None:
    host, leaves, pages = flat_leaves(case, group, seed=1)
    staging = reference.gather_pages(leaves, np.arange(pages.num_blocks, dtype=np.int32), pages)
    for block, record in enumerate(staging):
        assert bytes(record[: pages.block_bytes]) == case.oracle(host, group, block)
        assert not record[pages.block_bytes :].any()


@pytest.mark.parametrize(("case", "group"), ALL_GROUPS, ids=name_of)
def test_a_scattered_record_changes_what_the_oracle_changes(case: LayoutCase, group: GroupId) -> None:
    host, leaves, pages = flat_leaves(case, group, seed=1)
    block = pages.num_blocks - 1
    record = np.random.default_rng(2).integers(0, 256, (1, pages.record_bytes), dtype=np.uint8)
    status = reference.scatter_pages(record, np.array([block], np.int32), leaves, pages)
    assert status[StatusEntry.MOVED] == 1
    case.poke(host, group, block, bytes(record[0, : pages.block_bytes]))
    canonical = canonicalize(case.build(1), case.config, case.hints)
    for leaf, expected in zip(leaves, canonical.group_leaves(host_arrays(host), group), strict=True):
        assert_same_bytes(leaf, expected)


def host_arrays(host: Any) -> Any:
    """Host caches as JAX arrays again, one for one."""
    made: dict[int, Any] = {}
    return jax.tree_util.tree_map(lambda leaf: made.setdefault(id(leaf), jnp.array(leaf)), host)


def test_pool_ops_move_whole_records_and_refuse_what_lies_outside() -> None:
    case = LAYOUT_CASES[0]
    _, leaves, pages = flat_leaves(case, GroupId(0), seed=1)
    units = pages.record_bytes // 512
    pool = np.full(3 * pages.record_bytes, 0xEE, np.uint8)
    blocks = np.array([2, 5, 99, 4, -1], np.int32)
    addresses = np.array([units, 2 * units + 1, 0, -1, 0], np.int32)
    status = reference.offload(pool, leaves, blocks, addresses, pages)
    assert status[:4].tolist() == [1, 1, 0, 2]
    expected = np.full((3, pages.record_bytes), 0xEE, np.uint8)
    expected[1] = reference.gather_pages(leaves, np.array([2], np.int32), pages)[0]
    assert_same_bytes(pool, expected)

    into = np.array([7, 7], np.int32)
    status = reference.restore(pool, leaves, into, np.array([units, 0], np.int32), pages)
    assert status[:4].tolist() == [1, 0, 1, 0]
    restored = reference.gather_pages(leaves, np.array([7, 2], np.int32), pages)
    assert_same_bytes(restored[0], restored[1])
