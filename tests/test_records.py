"""Records of every layout on meshes that are only described: which bytes which device moves, and where to.

Nothing here has devices. ``LeafShards`` says who would hold what, NumPy slices of the whole array stand for
what each device holds.
"""

import jax
import numpy as np
import pytest

from jaxkv.layer_pages import find_layer_pages
from jaxkv.layout import CacheLeaf, LayoutHint
from jaxkv.records import PlacedPage, plan_local, plan_record
from jaxkv.sharding import LeafShards
from jaxkv.spec import MLAAttentionSpec
from jaxkv.testing import Sizes, assert_same_bytes, check_record_coverage, layout_cases
from jaxkv.testing.arrays import as_bytes

CASES = layout_cases(Sizes(num_blocks=7, tokens=4, heads=8, head_size=5))
MESHES = [(1, 2), (2, 1), (2, 4), (3, 8)]
"""Data shards, and devices that share each of them."""


def grid_of(page, struct, num_data_shards, num_devices):
    """Parts along each axis of a leaf."""
    grid = [1] * len(struct.shape)
    grid[page.data_axis] = num_data_shards
    if page.split_axis is not None:
        grid[page.split_axis] = page.num_parts(struct.shape, num_devices)
    return tuple(grid)


def cell_of(page, grid, device, num_devices):
    """The part of a leaf that a device holds; devices are numbered data shard by data shard."""
    cell = [0] * len(grid)
    cell[page.data_axis], of_shard = divmod(device, num_devices)
    if page.split_axis is not None:
        cell[page.split_axis] = of_shard % grid[page.split_axis]
    return tuple(cell)


def held_part(array, grid, cell):
    """What a device holds of a whole array."""
    index = []
    for size, parts, at in zip(array.shape, grid, cell, strict=True):
        index.append(slice(at * size // parts, (at + 1) * size // parts))
    return as_bytes(array[tuple(index)])


class DescribedMesh:
    """Unique leaves of a case over ``num_data_shards`` times ``num_devices`` devices."""

    def __init__(self, case, num_data_shards, num_devices):
        self.case = case
        self.leaves, self.cells, self.index = [], [], {}
        num_all = num_data_shards * num_devices
        for name, tree in case.shapes.items():
            for page, struct in zip(case.pages[name], jax.tree.leaves(tree), strict=True):
                if id(struct) in self.index:
                    continue
                self.index[id(struct)] = len(self.leaves)
                grid = grid_of(page, struct, num_data_shards, num_devices)
                cells = {device: cell_of(page, grid, device, num_devices) for device in range(num_all)}
                shards = LeafShards(grid, tuple(cells.items()))
                self.leaves.append(CacheLeaf(f"layer {name!r}", struct.shape, np.dtype(struct.dtype), shards))
                self.cells.append(cells)

    def plan(self, group, *, portable_pages):
        """The record of a group."""
        spec = self.case.config.groups[group]
        placed = []
        for name in spec.layer_names:
            indices = [self.index[id(struct)] for struct in jax.tree.leaves(self.case.shapes[name])]
            hints = self.case.hints.get(name, LayoutHint())
            hints = [hints] * len(indices) if isinstance(hints, LayoutHint) else hints
            leaves = [self.leaves[index] for index in indices]
            for index, part in zip(
                indices, find_layer_pages(spec.spec, leaves, spec.num_blocks, hints), strict=True
            ):
                is_portable = portable_pages and part.why_per_shard is None
                placed.append(PlacedPage(name, index, part, is_portable))
        return plan_record(plan_local(spec.num_blocks, placed, self.leaves), placed, self.leaves)

    def write_record(self, record, host, data_shard, block):
        """What all holders of a block write together; where several hold the same, the last of them."""
        arrays = {
            self.index[id(s)]: a
            for s, a in zip(jax.tree.leaves(dict(self.case.shapes)), jax.tree.leaves(host), strict=True)
        }
        written = np.full(record.record_bytes, 0xEE, np.uint8)
        for part in record.parts:
            for pages, holders in zip(part.shards, part.holders[data_shard], strict=True):
                for placement in pages.placements:
                    leaf, cell = placement.leaf, self.cells[placement.leaf][holders[-1]]
                    raw = held_part(arrays[leaf], self.leaves[leaf].shards.grid, cell)
                    for at_leaf, at_record in placement.plan.runs(block):
                        size = placement.plan.run_bytes
                        written[at_record : at_record + size] = raw[at_leaf : at_leaf + size]
                written[pages.clear_from :] = 0
        return written


def host_arrays(shapes):
    rng = np.random.default_rng(0)
    made = {}

    def make(struct):
        if id(struct) not in made:
            values = rng.integers(0, 256, (*struct.shape, np.dtype(struct.dtype).itemsize), np.uint8)
            made[id(struct)] = values.view(struct.dtype).reshape(struct.shape)
        return made[id(struct)]

    return jax.tree.map(make, shapes)


@pytest.mark.parametrize("portable_pages", [False, True], ids=["per_shard", "portable"])
@pytest.mark.parametrize(("num_data_shards", "num_devices"), MESHES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_records_of_a_mesh_are_tiled_and_equal_the_oracle(case, num_data_shards, num_devices, portable_pages):
    case = case.with_data_shards(num_data_shards)
    mesh, host = DescribedMesh(case, num_data_shards, num_devices), host_arrays(dict(case.shapes))
    for group in range(len(case.config.groups)):
        record = mesh.plan(group, portable_pages=portable_pages)
        check_record_coverage(record, [local_bytes(leaf) for leaf in mesh.leaves])
        for data_shard in range(num_data_shards):
            shard = case.data_shard(host, data_shard, num_data_shards)
            for block in (0, record.num_blocks - 1):
                written = mesh.write_record(record, host, data_shard, block)
                expected = case.oracle(shard, group, block, num_devices, is_portable=portable_pages)
                assert_same_bytes(written[: record.block_bytes], expected)
                assert not written[record.block_bytes :].any()


def test_parts_of_three_nested_loops_become_several_plans():
    (case,) = [case for case in CASES if case.name == "dense_stacked_kv"]
    whole = DescribedMesh(case, 1, 1).plan(0, portable_pages=True)
    split = DescribedMesh(case, 1, 4).plan(0, portable_pages=True)
    assert len(whole.parts[0].shards[0].placements) == 1
    assert [len(pages.placements) for pages in split.parts[0].shards] == [2] * 4


@pytest.mark.parametrize(("num_heads", "copies"), [(1, 4), (2, 4), (4, 2)])
def test_copies_of_one_head_are_recorded_once(num_heads, copies):
    """More devices than heads: each holds one, and neighbours hold copies of the same."""
    heads = np.random.default_rng(0).integers(0, 256, (7, 4, num_heads, 10), np.uint8)
    spec = MLAAttentionSpec(4, 10 * num_heads, np.uint8)
    num_devices = num_heads * copies
    cells = tuple((device, (0, 0, device, 0)) for device in range(num_devices))
    shards = LeafShards((1, 1, num_devices, 1), cells)
    leaf = CacheLeaf("layer 'a', leaf 0", (7, 4, num_devices, 10), np.dtype(np.uint8), shards)
    hint = LayoutHint(0, head_axis=2, head_copies=copies)
    (part,) = find_layer_pages(spec, [leaf], 7, [hint])
    placed = [PlacedPage("a", 0, part, is_portable=True)]
    (part,) = plan_record(plan_local(7, placed, [leaf]), placed, [leaf]).parts
    record = np.full(heads[3].size, 0xEE, np.uint8)
    for head, (pages, devices) in enumerate(zip(part.shards, part.holders[0], strict=True)):
        assert devices == tuple(range(head * copies, (head + 1) * copies))
        raw = as_bytes(heads[:, :, head])
        for placement in pages.placements:
            for at_leaf, at_record in placement.plan.runs(3):
                size = placement.plan.run_bytes
                record[at_record : at_record + size] = raw[at_leaf : at_leaf + size]
    assert_same_bytes(record, heads[3])


def local_bytes(leaf):
    return int(np.prod(leaf.local_shape)) * leaf.element_bits // 8
