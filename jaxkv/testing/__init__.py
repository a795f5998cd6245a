"""Shipped test kit: caches of random bits, an oracle of what a page is, byte-exact comparison, a case table.

``LAYOUT_CASES`` is the one table of cache layouts that every test of moved bytes runs over. A case has::

    case.name                                # and its pytest id: parametrize("case", LAYOUT_CASES, ids=str)
    case.config, case.hints                  # arguments of canonicalize(kv_caches, config, hints)
    case.shapes                              # the pytree as jax.ShapeDtypeStruct; same object = same array
    case.build(seed)                         # -> kv_caches: jax arrays of random bits, owned by XLA
    case.oracle(host_caches, group, block)   # -> bytes: the block's record without its padding
    case.poke(host_caches, group, block, record)   # writes such a record: the oracle of a restore

where ``host_caches = numpy_copy(kv_caches)``. The oracle slices logical NumPy arrays along the block axis
and never sees a ``jaxkv.layout.PagePlan``.
"""

from jaxkv.testing.arrays import assert_same_bytes, assert_same_caches, numpy_copy, random_caches
from jaxkv.testing.coverage import check_coverage, uncovered_bytes
from jaxkv.testing.layout_cases import LAYOUT_CASES, layout_case
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

__all__ = [
    "LAYOUT_CASES",
    "LayoutCase",
    "PageSlice",
    "assert_same_bytes",
    "assert_same_caches",
    "check_coverage",
    "layout_case",
    "numpy_copy",
    "random_caches",
    "uncovered_bytes",
]
