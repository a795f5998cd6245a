"""Devices that have no memory left, and records that need more of it than others."""

from __future__ import annotations

import jax
import pytest
from fresh_process import run_scenario

pytestmark = pytest.mark.cuda

GIB = 1 << 30


@pytest.mark.parametrize(
    "name", ["staging_refused", "staging_refused_and_pool_unpinned", "records_larger_than_staging"]
)
def test_staging_memory_that_is_not_there_or_too_small(name: str) -> None:
    run_scenario(name)


def test_what_finds_no_memory_raises_and_the_caches_keep_their_bytes() -> None:
    stats = jax.devices()[0].memory_stats()
    share = 1.5 * GIB / (stats["bytes_limit"] / 0.75)
    output = run_scenario("out_of_memory", XLA_PYTHON_CLIENT_MEM_FRACTION=f"{share:.4f}")
    assert "copying program: raised" in output
