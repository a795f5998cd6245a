"""When jaxkv's CUDA extension can be used: it was built, and the driver knows the CUDA it was built with."""

from __future__ import annotations

import sys
from ctypes.util import find_library
from types import SimpleNamespace

import pytest

from jaxkv.errors import NativeError
from jaxkv.host_pool import HostPool
from jaxkv.transfer import cuda, cuda_device
from jaxkv.transfer.block_transfer import make_backend
from jaxkv.transfer.cuda_device import has_cuda, load_cuda


@pytest.mark.parametrize(
    ("built", "driver", "expected"),
    [
        (13000, 0, False),
        (13000, 12080, False),
        (13010, 13000, True),
        (12080, 12040, True),
        (12080, 13000, True),
    ],
)
def test_the_driver_has_to_know_as_late_a_major_version(
    built: int, driver: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "load_cuda", lambda: SimpleNamespace(versions=lambda: (built, driver)))
    assert has_cuda() is expected


@pytest.mark.parametrize(
    ("driver", "told"), [(0, "this machine has no CUDA driver"), (12080, "a driver for CUDA 12; build jaxkv")]
)
def test_a_driver_that_is_too_old_is_named(driver: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(versions=lambda: (13000, driver))
    monkeypatch.setattr(cuda_device, "load_cuda", lambda: module)
    monkeypatch.setattr(cuda, "load_cuda", lambda: module)
    with HostPool(4096) as pool, pytest.raises(NativeError, match=told):
        make_backend("cuda", pool)


def test_without_the_extension_an_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxkv._cuda", None)
    load_cuda.cache_clear()
    try:
        assert not has_cuda()
        with HostPool(4096) as pool, pytest.raises(NativeError, match=r"does not load .*JAXKV_CUDA=on"):
            make_backend("cuda", pool)
    finally:
        load_cuda.cache_clear()


@pytest.mark.skipif(find_library("cuda") is not None, reason="there is a CUDA driver")
def test_the_extension_loads_where_there_is_no_driver() -> None:
    extension = pytest.importorskip("jaxkv._cuda", reason="built without nvcc")
    built, driver = extension.versions()
    assert (built >= 12010, driver) == (True, 0)
    with pytest.raises(NativeError, match="driver"):
        extension.Engine(0, 1 << 20)
