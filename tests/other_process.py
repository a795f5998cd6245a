"""Another process for tests of shared pools, and what it is asked to do there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.pool_handle import PoolHandle
from jaxkv.shared_pool import AttachedPool
from jaxkv.slots import Slot
from jaxkv.testing import LayoutCase, layout_case, numpy_copy
from jaxkv.transfer import BlockTransfer

MIB = 1 << 20
GROUP = GroupId(0)
NOBODY = 65534
TIMEOUT_S = 60


def serve(pipe: Connection) -> None:
    """Runs the functions that are sent, one after another."""
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))


@final
class OtherProcess:
    """A process that runs module-level functions. What they leave in ``held`` stays there."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        self._pipe.send((function, args))
        assert self._pipe.poll(TIMEOUT_S), f"process {self.pid} does not answer"
        return self._pipe.recv()

    def kill(self) -> None:
        self._process.kill()
        self.end()
        assert self._process.exitcode == -signal.SIGKILL

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


held: list[Any] = []
"""What a function run in another process leaves there."""


def open_shared(num_slots: int) -> tuple[PoolHandle, list[Slot]]:
    pool = HostPool(MIB, shared=True)
    slots = pool.reserve_slots(4096, num_slots)
    for i, slot in enumerate(slots):
        pool.view(slot)[:] = bytes([i + 1]) * 4096
    held.append(pool)
    return pool.handle, slots


def attach_and_keep(handle: PoolHandle) -> None:
    held.append(AttachedPool(handle))


def read_slots(slots: list[Slot]) -> list[bytes]:
    return [bytes(held[-1].view(slot)) for slot in slots]


def write_slots(slots: list[Slot], values: list[bytes]) -> None:
    for slot, value in zip(slots, values, strict=True):
        held[-1].view(slot)[:] = value


def close_last() -> None:
    held.pop().close()


def error_of(function: Callable[..., object], *args: object) -> str:
    """The type and the message of the error that ``function`` raises."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def attach_under_limit(limit: int, headroom_bytes: int | None, handle: PoolHandle) -> str:
    """What attaching says under a limit that leaves ``headroom_bytes`` of address space, or no files."""
    before = resource.getrlimit(limit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = 0 if headroom_bytes is None else pages * resource.getpagesize() + headroom_bytes
    resource.setrlimit(limit, (allowed, before[1]))
    try:
        return error_of(AttachedPool, handle)
    finally:
        resource.setrlimit(limit, before)


def open_without_file_size() -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        return error_of(lambda: HostPool(MIB, shared=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def attach_as_nobody(handle: PoolHandle) -> str:
    os.seteuid(NOBODY)
    try:
        return error_of(AttachedPool, handle)
    finally:
        os.seteuid(0)


def make_transfer(
    case_name: str, seed: int, pool: HostPool | AttachedPool, backend: str
) -> tuple[LayoutCase, Any, BlockTransfer]:
    case = layout_case(case_name)
    kv_caches = case.build(seed)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    return case, kv_caches, BlockTransfer(canonical, pool, backend=backend)


def offload_attached(handle: PoolHandle, case_name: str, backend: str, ids: list[int], slots: Any) -> Any:
    with AttachedPool(handle) as pool:
        _, kv_caches, transfer = make_transfer(case_name, 1, pool, backend)
        return transfer.offload(kv_caches, GROUP, ids, slots).wait().error


def restore_attached(handle: PoolHandle, case_name: str, backend: str, ids: list[int], slots: Any) -> Any:
    with AttachedPool(handle) as pool:
        _, kv_caches, transfer = make_transfer(case_name, 2, pool, backend)
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, ids, slots)
        assert ticket.wait().error is None
        return numpy_copy(kv_caches)
