"""How long pools stay pinned for devices; pinning and unpinning are a list of the test's own."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import jax
import pytest

from jaxkv.host_pool import HostPool
from jaxkv.transfer import cuda_device
from jaxkv.transfer.cuda_device import pin_pool


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    module = SimpleNamespace(
        pin_pool=lambda *_: calls.append("pin"), unpin_pool=lambda *_: calls.append("unpin")
    )
    monkeypatch.setattr(cuda_device, "load_cuda", lambda: module)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [SimpleNamespace(local_hardware_id=0)])
    return calls


def test_a_pool_is_pinned_once_and_until_it_is_closed(told: list[str]) -> None:
    with HostPool(4096) as pool:
        pin_pool(pool)
        pin_pool(pool)
        assert told == ["pin"]
    assert told == ["pin", "unpin"]
    del pool
    gc.collect()
    assert told == ["pin", "unpin"]


def test_a_pool_that_nobody_closes_is_unpinned_with_its_last_name(told: list[str]) -> None:
    pool = HostPool(4096)
    pin_pool(pool)
    del pool
    gc.collect()
    assert told == ["pin", "unpin"]


def test_a_forked_child_unpins_nothing(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool(4096)
    pin_pool(pool)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del pool
    gc.collect()
    assert told == ["pin"]
