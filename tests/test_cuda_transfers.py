"""How Python begins and ends transfers of the engine of a device: here on the CPU, with an engine that moves
nothing and remembers what it was told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.errors import NativeError
from jaxkv.host_pool import HostPool
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.transfer import cuda, cuda_device
from jaxkv.transfer.checks import no_entries
from jaxkv.transfer.cuda import CudaMover, CudaTransfer
from jaxkv.transfer.cuda_device import CudaDevice
from jaxkv.transfer.cuda_paths import PATHS_VARIABLE
from jaxkv.transfer.status import make_status

SHAPE = (16, 2, 8, 2, 32)


class Engine:
    staging_refusal = ""
    paths = (0, 0, 1)

    def __init__(self, *_: object) -> None:
        self.free: list[int] = []
        self.calls: list[str] = []

    def fit(self, record_bytes: int) -> None:
        pass

    def open(self, numbers: npt.NDArray[np.int32]) -> int | None:
        return self.free.pop() if self.free else None

    def add_tag(self, address: int) -> None:
        self.free.append(address)

    def has_ended(self, tag: int) -> bool:
        return True

    def close(self, tag: int) -> tuple[list[int], str]:
        self.calls.append("close")
        self.free.append(tag)
        return make_status(moved=3).tolist(), ""

    def abandon(self, tag: int) -> None:
        self.calls.append("abandon")

    def cancel(self, number: int) -> None:
        self.calls.append("cancel")

    def forget(self, number: int) -> None:
        self.calls.append("forget")


class Program:
    """What a program returned; ``block_until_ready`` raises what it is told, in order."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.has_ended = True

    def is_ready(self) -> bool:
        return self.has_ended

    def block_until_ready(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """The last of JAX's devices, with such an engine."""
    monkeypatch.setenv(PATHS_VARIABLE, "direct")
    module = SimpleNamespace(Engine=Engine, versions=lambda: (0, 0))
    monkeypatch.setattr(cuda_device, "load_cuda", lambda: module)
    device = CudaDevice(jax.devices()[-1])
    monkeypatch.setattr(cuda, "cuda_device", lambda _: device)
    return device


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


def mover_of(leaf: jax.Array, pool: HostPool) -> CudaMover:
    spec = FullAttentionSpec(SHAPE[2], SHAPE[3], SHAPE[4], jnp.float32)
    config = KVCacheConfig((KVCacheGroupSpec(("layer",), spec, SHAPE[0]),))
    return CudaMover(pool, canonicalize({"layer": leaf}, config).records[0].parts[0].shards[0])


def transfer_of(on: CudaDevice, program: Any) -> CudaTransfer:
    tag = on.open(np.zeros(2, np.int32))
    return CudaTransfer(on, tag.unsafe_buffer_pointer(), 1, program)


def calls(on: CudaDevice) -> list[str]:
    engine: Any = on.engine
    told: list[str] = engine.calls
    return told


def test_a_tag_is_given_back_once_its_program_has_ended(on: CudaDevice) -> None:
    transfer = transfer_of(on, Program())
    assert np.asarray(transfer)[0] == 3
    assert np.asarray(transfer)[0] == 3
    assert calls(on) == ["close", "forget"]


def test_a_program_that_failed_gives_its_tag_back(on: CudaDevice) -> None:
    transfer = transfer_of(on, Program(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        np.asarray(transfer)
    assert calls(on) == ["close", "forget"]


def test_an_interrupted_wait_gives_back_no_tag_that_a_program_may_still_look_for(on: CudaDevice) -> None:
    transfer = transfer_of(on, Program(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        np.asarray(transfer)
    assert calls(on) == []
    assert np.asarray(transfer)[0] == 3
    assert calls(on) == ["close", "forget"]


@pytest.mark.parametrize(("error", "told"), [(NativeError("no"), "close"), (KeyboardInterrupt(), "abandon")])
def test_a_launch_that_was_interrupted_may_have_launched(
    error: BaseException, told: str, on: CudaDevice, pool: HostPool
) -> None:
    def launch(*_: object) -> jax.Array:
        raise error

    leaf = jax.device_put(jnp.zeros(SHAPE), on.device)
    mover = mover_of(leaf, pool)
    mover.read_program = launch
    with pytest.raises(type(error)):
        mover.offload([leaf], no_entries(8))
    assert calls(on) == [told]


def test_caches_that_are_committed_to_no_device_stay_where_they_are(on: CudaDevice, pool: HostPool) -> None:
    with jax.default_device(on.device):
        leaf = jnp.zeros(SHAPE)
    mover = mover_of(leaf, pool)
    out: Any = mover.offload([leaf], no_entries(8))
    assert out._launched.devices() == {on.device}
    (written,), _ = mover.restore([leaf], no_entries(8))
    assert written.devices() == {on.device}
    assert not written.committed  # type: ignore[attr-defined]


def test_a_transfer_that_nobody_waits_for_is_closed_after_it_has_ended(on: CudaDevice) -> None:
    program = Program()
    program.has_ended = False
    tag = transfer_of(on, program)._tag
    assert on.open(np.zeros(2, np.int32)).unsafe_buffer_pointer() != tag
    assert calls(on) == []
    program.has_ended = True
    assert on.open(np.zeros(2, np.int32)).unsafe_buffer_pointer() == tag
    assert calls(on) == ["close", "forget"]


def test_a_number_called_off_too_late_is_not_remembered(on: CudaDevice) -> None:
    transfer = transfer_of(on, Program())
    np.asarray(transfer)
    transfer.cancel()
    assert calls(on) == ["close", "forget", "cancel", "forget"]
