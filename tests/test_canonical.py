"""Canonical caches of every layout in the table: pages, shared leaves, step-time access."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize, canonicalize_shapes
from jaxkv.errors import CacheMismatchError, DeletedCacheError
from jaxkv.layout import LayoutHint
from jaxkv.records import RECORD_ALIGNMENT
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    page_size_bytes,
)
from jaxkv.testing import (
    LAYOUT_CASES,
    assert_same_bytes,
    assert_same_caches,
    check_coverage,
    layout_case,
    numpy_copy,
    random_caches,
    uncovered_bytes,
)
from jaxkv.testing.arrays import as_bytes

each_case = pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)


def raw_leaves(canonical, kv_caches):
    return [as_bytes(leaf) for leaf in canonical.leaves(kv_caches)]


def gather(pages, raw, block):
    record = np.full(pages.block_bytes, 0xEE, np.uint8)
    for placement in pages.placements:
        size = placement.plan.run_bytes
        for source, target in placement.plan.runs(block):
            record[target : target + size] = raw[placement.leaf][source : source + size]
    return record


@each_case
def test_gathered_block_record_equals_the_oracle(case):
    kv_caches = case.build(1)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    raw = raw_leaves(canonical, kv_caches)
    host_caches = numpy_copy(kv_caches)
    for group, pages in enumerate(canonical.groups):
        check_coverage(pages, [leaf.size for leaf in raw])
        for block in range(pages.num_blocks):
            assert_same_bytes(gather(pages, raw, block), case.oracle(host_caches, group, block))


@each_case
def test_record_holds_the_pages_of_the_spec_rounded_up(case):
    canonical = canonicalize_shapes(case.shapes, case.config, case.hints)
    for group, pages in zip(case.config.groups, canonical.groups, strict=True):
        assert pages.num_blocks == group.num_blocks
        assert pages.block_bytes == group.page_size_bytes
        assert pages.block_bytes <= pages.record_bytes < pages.block_bytes + RECORD_ALIGNMENT
        assert pages.record_bytes % RECORD_ALIGNMENT == 0


@each_case
def test_refs_name_every_layer_with_the_bytes_of_its_spec(case):
    canonical = canonicalize_shapes(case.shapes, case.config, case.hints)
    for group, refs, pages in zip(
        case.config.groups, canonical.group_data_refs, canonical.groups, strict=True
    ):
        stored = collections.Counter()
        for ref, placement in zip(refs, pages.placements, strict=True):
            assert (ref.tensor_idx, ref.page_size_bytes) == (placement.leaf, placement.plan.page_bytes)
            stored[ref.layer_name] += ref.page_size_bytes
        assert stored == dict.fromkeys(group.layer_names, page_size_bytes(group.spec))
        assert list(stored) == list(group.layer_names)


@each_case
def test_tensors_are_the_distinct_leaves_seen_as_rows(case):
    kv_caches = case.build(2)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    leaves = canonical.leaves(kv_caches)
    assert len(leaves) == len({id(leaf) for leaf in jax.tree.leaves(kv_caches)})
    for tensor, leaf in zip(canonical.tensors, leaves, strict=True):
        assert tensor.num_blocks * tensor.page_size_bytes == as_bytes(leaf).size


@each_case
def test_shapes_alone_give_the_same_layout_as_arrays(case):
    from_arrays = canonicalize(case.build(3), case.config, case.hints)
    from_shapes = canonicalize_shapes(case.shapes, case.config, case.hints)
    for name in ("tensors", "group_data_refs", "groups", "fingerprint"):
        assert getattr(from_arrays, name) == getattr(from_shapes, name)


@each_case
def test_replaced_leaves_stand_where_the_old_ones_stood(case):
    old, new = case.build(4), case.build(5)
    canonical = canonicalize(old, case.config, case.hints)
    caches = old
    for group in range(len(case.config.groups)):
        caches = canonical.replace(caches, group, canonical.group_leaves(new, group))
    assert_same_caches(caches, new)
    assert_same_caches(old, case.build(4))
    assert [id(leaf) for leaf in canonical.leaves(caches)] == [id(leaf) for leaf in canonical.leaves(new)]


@each_case
def test_random_caches_are_donated_in_place(case):
    kv_caches = case.build(6)
    numpy_copy(kv_caches)
    leaf = jax.tree.leaves(kv_caches)[0]
    address = leaf.unsafe_buffer_pointer()
    written = jax.jit(lambda x: x.at[(0,) * x.ndim].set(0), donate_argnums=0)(leaf)
    assert written.unsafe_buffer_pointer() == address


@each_case
def test_poked_record_is_read_back_and_changes_nothing_else(case):
    before = numpy_copy(case.build(7))
    for group, group_spec in enumerate(case.config.groups):
        for block in range(group_spec.num_blocks):
            caches = jax.tree.map(np.copy, before)
            case.poke(caches, group, block, bytes(group_spec.page_size_bytes))
            assert case.oracle(caches, group, block) == bytes(group_spec.page_size_bytes)
            case.poke(caches, group, block, case.oracle(before, group, block))
            assert_same_caches(caches, before)


def test_random_bits_reach_the_device_unchanged():
    shapes = {
        "x": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((4096,), jnp.bfloat16),
    }
    caches = numpy_copy(random_caches(shapes, 8))
    rng = np.random.default_rng(8)
    for name, itemsize in (("x", 4), ("y", 2)):
        assert_same_bytes(caches[name], rng.integers(0, 256, 4096 * itemsize, np.uint8))
        assert np.isnan(caches[name].astype(np.float32)).any()


def test_uncovered_bytes_of_an_overlaid_row_are_its_padding():
    case = layout_case("overlaid_rows")
    canonical = canonicalize_shapes(case.shapes, case.config, case.hints)
    attention, state = canonical.groups
    row_bytes = canonical.tensors[0].page_size_bytes
    assert uncovered_bytes(attention, 0, 9 * row_bytes) == 0
    assert uncovered_bytes(state, 0, 9 * row_bytes) == 9 * (
        row_bytes - page_size_bytes(case.config.groups[1].spec)
    )


def test_groups_that_share_rows_share_tensors():
    case = layout_case("overlaid_rows")
    canonical = canonicalize(case.build(0), case.config, case.hints)
    assert len(canonical.tensors) == 2
    assert canonical.groups[0].leaves == canonical.groups[1].leaves == (0, 1)


def test_layout_survives_a_jitted_step_that_donates_the_caches():
    case = layout_case("hybrid")
    kv_caches = case.build(9)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    after = jax.jit(lambda caches: jax.tree.map(lambda x: x.at[0].set(0), caches), donate_argnums=0)(
        kv_caches
    )
    canonical.leaves(after)
    with pytest.raises(DeletedCacheError, match="was deleted"):
        canonical.leaves(kv_caches)


def test_leaves_work_on_tracers():
    case = layout_case("hybrid")
    kv_caches = case.build(10)
    canonical = canonicalize(kv_caches, case.config, case.hints)

    @jax.jit
    def clear_group(caches):
        return canonical.replace(
            caches, 1, [jnp.zeros_like(leaf) for leaf in canonical.group_leaves(caches, 1)]
        )

    cleared = clear_group(kv_caches)
    assert not np.asarray(cleared["window.1"][0]).any()
    assert_same_caches(cleared["full.0"], kv_caches["full.0"])


def test_replace_puts_leaves_back_after_the_old_ones_were_donated():
    case = layout_case("packed_kv")
    kv_caches = case.build(11)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    leaves = canonical.leaves(kv_caches)
    new = jax.jit(lambda *xs: [x.at[0].set(0) for x in xs], donate_argnums=range(len(leaves)))(*leaves)
    restored = canonical.replace(kv_caches, 0, new)
    assert canonical.leaves(restored) == new


def test_replaced_shared_leaf_stands_in_every_layer_that_uses_it():
    case = layout_case("overlaid_rows")
    kv_caches = case.build(12)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    new = [jnp.zeros_like(leaf) for leaf in canonical.leaves(kv_caches)]
    replaced = canonical.replace(kv_caches, 0, new)
    assert replaced["attn.0"] is replaced["mamba.0"] is new[0]
    assert replaced["attn.1"] is replaced["mamba.1"] is new[1]


def test_containers_keep_their_types():
    Pair = collections.namedtuple("Pair", "k v")
    k, v = (jnp.zeros((5, 4, 2, 8), jnp.bfloat16) for _ in range(2))
    config = KVCacheConfig((KVCacheGroupSpec(("a",), FullAttentionSpec(4, 2, 8, jnp.bfloat16), 5),))
    for layer in (Pair(k, v), (k, v), [k, v], {"k": k, "v": v}):
        canonical = canonicalize({"a": layer}, config)
        replaced = canonical.replace({"a": layer}, 0, [v, k])
        assert type(replaced["a"]) is type(layer)
        assert jax.tree.leaves(replaced)[0] is v


def test_k_and_v_may_be_parts_of_one_array():
    row = jnp.arange(5 * 64, dtype=jnp.uint8).reshape(5, 64)
    config = KVCacheConfig((KVCacheGroupSpec(("a",), FullAttentionSpec(4, 2, 2, jnp.bfloat16), 5),))
    parts = [LayoutHint(0, page_offset_bytes=start, page_size_bytes=32) for start in (32, 0)]
    canonical = canonicalize({"a": (row, row)}, config, {"a": parts})
    (pages,) = canonical.groups
    check_coverage(pages, [row.size])
    assert_same_bytes(gather(pages, [as_bytes(row)], 3), np.roll(np.array(row[3]), 32))
    new = jnp.zeros_like(row)
    assert canonical.replace({"a": (row, row)}, 0, [new])["a"] == (new, new)


def test_groups_may_count_the_blocks_of_one_array_differently():
    rows = jnp.arange(12 * 16, dtype=jnp.uint8).reshape(12, 16)
    groups = (
        KVCacheGroupSpec(("a",), MLAAttentionSpec(4, 4, jnp.uint8), 12),
        KVCacheGroupSpec(("b",), MLAAttentionSpec(8, 4, jnp.uint8), 6),
    )
    canonical = canonicalize({"a": rows, "b": rows}, KVCacheConfig(groups), {"b": LayoutHint(0, 2)})
    for pages, blocks in zip(canonical.groups, (rows, rows.reshape(6, 32)), strict=True):
        check_coverage(pages, [rows.size])
        assert_same_bytes(gather(pages, [as_bytes(rows)], 4), blocks[4])


def fingerprint(case, **changes):
    case = dataclasses.replace(case, **changes)
    return canonicalize_shapes(case.shapes, case.config, case.hints).fingerprint


def test_fingerprints_are_equal_exactly_where_records_mean_the_same():
    prints = {}
    for case in LAYOUT_CASES:
        prints.setdefault(fingerprint(case), []).append(case.name)
    assert [names for names in prints.values() if len(names) > 1] == [
        ["packed_kv", "block_axis_last"],
        ["kv_axis_first", "kv_axis_second"],
        ["layers_in_one_block", "layers_outside_blocks"],
    ]


def test_fingerprint_leaves_out_the_number_of_blocks():
    case = layout_case("head_major")
    group = dataclasses.replace(case.config.groups[0], num_blocks=23)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, 23, 4, 5), s.dtype), case.shapes)
    assert fingerprint(case) == fingerprint(case, config=KVCacheConfig((group,)), shapes=shapes)


def test_fingerprint_tells_apart_what_each_layer_takes_of_a_row():
    case = layout_case("layers_in_one_block")
    first, second, third = case.hints.values()
    swapped = dict(zip(case.hints, (second, first, third), strict=True))
    assert fingerprint(case) != fingerprint(case, hints=swapped)


@each_case
def test_equal_layouts_compare_and_hash_equal(case):
    first, second = (canonicalize_shapes(case.shapes, case.config, case.hints) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_fingerprint_is_the_same_in_every_process():
    # It is part of cache keys, which outlive the process.
    assert fingerprint(layout_case("hybrid")) == "dd2acab5360227332287afc4a09c2126"


def test_leaves_refuse_arrays_that_no_longer_alias():
    case = layout_case("overlaid_rows")
    kv_caches = case.build(13)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    with pytest.raises(CacheMismatchError, match="one buffer, and now there are two"):
        canonical.leaves(kv_caches | {"mamba.1": jnp.copy(kv_caches["mamba.1"])})
