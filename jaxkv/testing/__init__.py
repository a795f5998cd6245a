"""Shipped test kit: caches of random bits, an oracle of what a page is, byte-exact comparison, a case table.

``LAYOUT_CASES`` is the one table of cache layouts that every test of moved bytes runs over;
``layout_cases(sizes)`` is the same at other sizes. A case has::

    case.name                                # and its pytest id: parametrize("case", LAYOUT_CASES, ids=str)
    case.config, case.hints                  # arguments of canonicalize(kv_caches, config, hints)
    case.shapes                              # the pytree as jax.ShapeDtypeStruct; same object = same array
    case.build(seed)                         # -> kv_caches: jax arrays of random bits, owned by XLA
    case.oracle(host_caches, group, block)   # -> bytes: the block's record without its padding
    case.poke(host_caches, group, block, record)   # writes such a record: the oracle of a restore

where ``host_caches = numpy_copy(kv_caches)``. The oracle slices logical NumPy arrays along the block axis
and never sees a ``jaxkv.page_plan.PagePlan``.

``case.pages[layer]`` says for each leaf which axis serving stacks split over devices (``split_axis``), and
whether that axis lists heads. For the record of such a mesh give ``num_devices`` and ``is_portable`` to
``oracle`` and ``poke``. For blocks over data shards, ``case.with_data_shards(count)`` has longer arrays, and
``case.data_shard(host_caches, index, count)`` are views of one shard's blocks, to which ids are local.
"""

from jaxkv.testing.arrays import assert_same_bytes, assert_same_caches, numpy_copy, random_caches
from jaxkv.testing.case_parts import Sizes
from jaxkv.testing.coverage import check_coverage, check_record_coverage, uncovered_bytes
from jaxkv.testing.layout_cases import LAYOUT_CASES, layout_case, layout_cases
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

__all__ = [
    "LAYOUT_CASES",
    "LayoutCase",
    "PageSlice",
    "Sizes",
    "assert_same_bytes",
    "assert_same_caches",
    "check_coverage",
    "check_record_coverage",
    "layout_case",
    "layout_cases",
    "numpy_copy",
    "random_caches",
    "uncovered_bytes",
]
