"""The host pool in threads and forked processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

from jaxkv.host_pool import HostPool

MIB = 1 << 20


def test_a_pool_cannot_be_used_in_a_forked_child() -> None:
    script = """
        import os
        from jaxkv.errors import PoolForkedError
        from jaxkv.host_pool import HostPool

        pool = HostPool(1 << 16)
        (slot,) = pool.reserve_slots(4096, 1)
        view = pool.view(slot)
        child = os.fork()
        if child == 0:
            uses = (
                lambda: pool.view(slot), lambda: pool.free(slot), lambda: pool.try_reserve(512), pool.close,
                lambda: pool._arena.view(0, 1),
            )
            refused = 0
            for use in uses:
                try:
                    use()
                except PoolForkedError as error:
                    refused += "after fork" in str(error)
            view[:] = bytes(4096)
            os._exit(0 if refused == len(uses) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        view[:2] = b"ok"
        assert bytes(pool.view(slot)[:2]) == b"ok"
        pool.free(slot)
        pool.close()
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_threads_never_share_a_slot() -> None:
    with HostPool(4 * MIB) as pool:
        clashes: list[int] = []

        def work(mark: int) -> None:
            for round_ in range(50):
                slots = pool.reserve_slots((600, 5000, 70000)[(mark + round_) % 3], 2)
                for slot in slots:
                    pool.view(slot)[:] = bytes([mark]) * slot.num_bytes
                for slot in slots:
                    if set(pool.view(slot)) != {mark}:
                        clashes.append(mark)
                    pool.free(slot)

        pool.fit_slabs((600, 5000, 70000))
        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not clashes
        assert pool.used_bytes == 0
