"""What tests of the CUDA path share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import jax
import pytest

from jaxkv.host_pool import HostPool
from jaxkv.transfer.cuda_device import cuda_device
from jaxkv.transfer.cuda_paths import FORCED


@pytest.fixture
def engine() -> Iterator[Any]:
    """The engine of the first device. Its paths are put back after the test."""
    found = cuda_device(jax.devices()[0]).engine
    before = found.paths
    yield found
    found.paths = before


@pytest.fixture(params=FORCED)
def path(request: pytest.FixtureRequest, engine: Any) -> str:
    """Every way in turn that transfers may go, whatever their size."""
    engine.paths = astuple(FORCED[request.param])
    return request.param


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(4 << 20) as opened:
        yield opened
