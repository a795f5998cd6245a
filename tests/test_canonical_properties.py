"""Canonical caches of random models: pages tile, blocks come back, wrong descriptions are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_cases import layout_cases, num_bytes

from jaxkv.canonical import canonicalize, canonicalize_shapes
from jaxkv.errors import CacheMismatchError
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import KVCacheConfig, MambaSpec, page_size_bytes
from jaxkv.testing import assert_same_bytes, assert_same_caches, check_coverage, numpy_copy
from jaxkv.testing.arrays import as_bytes, from_bytes
from jaxkv.transfer import BlockTransfer, reference


@pytest.fixture(scope="module")
def pool():
    with HostPool(1 << 20) as opened:
        yield opened


def host_arrays(shapes, seed):
    """NumPy arrays of random bits for a pytree of structs; the same struct is the same array."""
    rng = np.random.default_rng(seed)
    made = {}

    def make(struct):
        if id(struct) not in made:
            made[id(struct)] = from_bytes(rng.bytes(num_bytes(struct)), struct.dtype, struct.shape)
        return made[id(struct)]

    return jax.tree.map(make, shapes)


def raw_leaves(canonical, host):
    """Bytes of the unique leaves, in their order."""
    raw = {}
    for index, array in zip(canonical.positions.unique_at, jax.tree.leaves(host), strict=True):
        raw.setdefault(index, as_bytes(array).copy())
    return [raw[index] for index in range(len(raw))]


@settings(max_examples=150)
@given(layout_cases())
def test_runs_of_each_group_tile_its_pages_exactly_once(case):
    canonical = canonicalize_shapes(case.shapes, case.config, case.hints)
    leaf_bytes = [tensor.num_blocks * tensor.page_size_bytes for tensor in canonical.tensors]
    for group, pages in zip(case.config.groups, canonical.groups, strict=True):
        check_coverage(pages, leaf_bytes)
        assert pages.block_bytes == group.page_size_bytes


@settings(max_examples=150)
@given(layout_cases(), st.data())
def test_every_block_is_read_and_written_as_the_oracle_does(case, data):
    """Gather, scramble and scatter with the plans, and change nothing else."""
    canonical = canonicalize_shapes(case.shapes, case.config, case.hints)
    host = host_arrays(case.shapes, 1)
    group = data.draw(st.integers(0, len(canonical.groups) - 1))
    pages = canonical.groups[group]
    leaves = [raw_leaves(canonical, host)[index] for index in pages.leaves]
    blocks = data.draw(st.permutations(range(pages.num_blocks)))
    staging = reference.gather_pages(leaves, np.array(blocks, np.int32), pages)
    for block, record in zip(blocks, staging, strict=True):
        assert_same_bytes(record[: pages.block_bytes], case.oracle(host, group, block))
    into = data.draw(st.permutations(blocks))
    scrambled = host_arrays(case.shapes, 2)
    written = [raw_leaves(canonical, scrambled)[index] for index in pages.leaves]
    reference.scatter_pages(staging, np.array(into, np.int32), written, pages)
    for block, place in zip(blocks, into, strict=True):
        case.poke(scrambled, group, place, case.oracle(host, group, block))
    expected = [raw_leaves(canonical, scrambled)[index] for index in pages.leaves]
    for leaf, wanted in zip(written, expected, strict=True):
        assert_same_bytes(leaf, wanted)


@settings(max_examples=12)
@given(layout_cases())
def test_what_is_offloaded_scrambled_and_restored_is_as_before(pool, case):
    kv_caches = case.build(1)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    host, scrambled = numpy_copy(kv_caches), case.build(2)
    expected = numpy_copy(scrambled)
    for group, pages in enumerate(canonical.groups):
        blocks = range(pages.num_blocks)
        with transfer.reserve(GroupId(group), len(blocks)) as slots:
            assert transfer.offload(kv_caches, GroupId(group), blocks, slots).wait().error is None
            scrambled, ticket = transfer.restore(scrambled, GroupId(group), blocks, slots)
            assert ticket.wait().error is None
        for block in blocks:
            case.poke(expected, group, block, case.oracle(host, group, block))
            assert case.oracle(numpy_copy(scrambled), group, block) == case.oracle(host, group, block)
    assert_same_caches(scrambled, expected)


# -- wrong descriptions -------------------------------------------------------------------------------------


def refuse(case, *layers):
    """Asserts that the case is refused, with the name of one of ``layers`` and a reason."""
    with pytest.raises(CacheMismatchError) as refused:
        canonicalize_shapes(case.shapes, case.config, case.hints)
    message = str(refused.value)
    assert any(repr(layer) in message for layer in layers), message
    assert "; " in message, message


def uses(tree, struct):
    return any(leaf is struct for leaf in jax.tree.leaves(tree))


def replace_leaf(case, old, new):
    """The case with another struct wherever ``old`` stands, and the layers where it does."""
    layers = [name for name, tree in case.shapes.items() if uses(tree, old)]
    swap = {
        name: jax.tree.map(lambda leaf: new if leaf is old else leaf, tree)
        for name, tree in case.shapes.items()
    }
    return dataclasses.replace(case, shapes=swap), layers


def is_cut(case, name):
    """Whether hints take a part of each block, so that the rest may be of any size and dtype."""
    return any(page.stop is not None for page in case.pages[name])


@st.composite
def cases_and_leaves(draw):
    """A case, and a leaf that is not cut for any layer."""
    case = draw(layout_cases())
    cut = [tree for name, tree in case.shapes.items() if is_cut(case, name)]
    uncut = [leaf for leaf in jax.tree.leaves(dict(case.shapes)) if not uses(cut, leaf)]
    assume(uncut)
    return case, draw(st.sampled_from(uncut))


@settings(max_examples=150)
@given(cases_and_leaves(), st.data())
def test_a_leaf_with_one_axis_of_another_size_is_refused(case_and_leaf, data):
    case, leaf = case_and_leaf
    axis = data.draw(st.integers(0, len(leaf.shape) - 1))
    size = data.draw(st.integers(0, 2 * leaf.shape[axis] + 1).filter(lambda size: size != leaf.shape[axis]))
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    wrong, layers = replace_leaf(case, leaf, jax.ShapeDtypeStruct(shape, leaf.dtype))
    refuse(wrong, *layers)


@settings(max_examples=100)
@given(cases_and_leaves(), st.sampled_from([jnp.float16, jnp.int32, jnp.bool_, jnp.uint4, jnp.complex64]))
def test_a_leaf_of_another_dtype_is_refused(case_and_leaf, dtype):
    case, leaf = case_and_leaf
    spec = next(
        group.spec
        for group in case.config.groups
        if any(uses(case.shapes[name], leaf) for name in group.layer_names)
    )
    # Beside values whose spec says what a page stores, only sizes can be wrong.
    assume(isinstance(spec, MambaSpec) or spec.page_size_bytes is None)
    assume(leaf.dtype != np.dtype(dtype))
    wrong, layers = replace_leaf(case, leaf, jax.ShapeDtypeStruct(leaf.shape, dtype))
    refuse(wrong, *layers)


@settings(max_examples=100)
@given(layout_cases(), st.data())
def test_another_number_of_blocks_is_refused(case, data):
    groups = list(case.config.groups)
    index = data.draw(st.integers(0, len(groups) - 1))
    other = data.draw(st.integers(1, 14).filter(lambda count: count != groups[index].num_blocks))
    groups[index] = dataclasses.replace(groups[index], num_blocks=other)
    refuse(dataclasses.replace(case, config=KVCacheConfig(tuple(groups))), *groups[index].layer_names)


@settings(max_examples=100)
@given(layout_cases(), st.data())
def test_a_spec_that_stores_another_size_is_refused(case, data):
    groups = list(case.config.groups)
    index = data.draw(st.integers(0, len(groups) - 1))
    group, stored = groups[index], page_size_bytes(groups[index].spec)
    assume(not isinstance(group.spec, MambaSpec))
    size = data.draw(st.integers(1, 2 * stored).filter(lambda size: size != stored))
    groups[index] = dataclasses.replace(group, spec=dataclasses.replace(group.spec, page_size_bytes=size))
    refuse(dataclasses.replace(case, config=KVCacheConfig(tuple(groups))), *group.layer_names)


@settings(max_examples=100)
@given(layout_cases(), st.data())
def test_states_that_differ_from_their_spec_are_refused(case, data):
    groups = list(case.config.groups)
    # A row of bytes may hold any states that are not longer.
    typed = [
        index
        for index, group in enumerate(groups)
        if isinstance(group.spec, MambaSpec) and group.spec.page_size_padded is None
    ]
    assume(typed)
    index = data.draw(st.sampled_from(typed))
    spec = groups[index].spec
    other = ((*spec.shapes[0], 2), *spec.shapes[1:])
    changed = MambaSpec(spec.block_size, other, spec.dtypes)
    groups[index] = dataclasses.replace(groups[index], spec=changed)
    refuse(dataclasses.replace(case, config=KVCacheConfig(tuple(groups))), *groups[index].layer_names)


@settings(max_examples=100)
@given(layout_cases(), st.data())
def test_a_layer_without_one_of_its_leaves_or_with_one_too_many_is_refused(case, data):
    name = data.draw(st.sampled_from(sorted(case.shapes)))
    leaves = jax.tree.leaves(case.shapes[name])
    if data.draw(st.booleans()):
        leaves = leaves[1:]
    else:
        leaves = [*leaves, jax.ShapeDtypeStruct(leaves[0].shape, leaves[0].dtype)]
    hints = {layer: hint for layer, hint in case.hints.items() if layer != name}
    refuse(dataclasses.replace(case, shapes=case.shapes | {name: leaves}, hints=hints), name)


@settings(max_examples=100)
@given(layout_cases(), st.data())
def test_two_layers_of_a_group_over_the_same_bytes_are_refused(case, data):
    groups = [group for group in case.config.groups if len(group.layer_names) > 1]
    assume(groups)
    first, second = data.draw(st.permutations(data.draw(st.sampled_from(groups)).layer_names))[:2]
    shapes = {**case.shapes, second: case.shapes[first]}
    hints = {name: hint for name, hint in case.hints.items() if name != second}
    hints |= {second: hints[first]} if first in hints else {}
    refuse(dataclasses.replace(case, shapes=shapes, hints=hints), first, second)
