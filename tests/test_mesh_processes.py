"""A mesh over two processes of one host, in one shared pool or a pool for each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("mesh_process.py")
TIMEOUT_S = 600


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(rank: int, port: int, directory: Path) -> subprocess.Popen[bytes]:
    search = os.pathsep.join(filter(None, [str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]))
    with (directory / f"log.{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", SCRIPT, str(rank), str(port), directory],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search},
        )


def wait_for(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Exit codes: of all, or as they are once one has failed or time is up. Leaves no process behind."""
    deadline_s = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline_s:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                return codes
            time.sleep(0.05)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_move_the_blocks_of_one_mesh(tmp_path: Path) -> None:
    """What is checked stands in ``mesh_process.py``; both processes must come to its end."""
    port = free_port()
    codes = wait_for([start(rank, port, tmp_path) for rank in (0, 1)], TIMEOUT_S)
    logs = "\n".join(
        f"-- process {rank}:\n{(tmp_path / f'log.{rank}').read_text()[-4000:]}" for rank in (0, 1)
    )
    assert codes == [0, 0], logs


def test_a_process_that_dies_or_hangs_takes_the_other_one_with_it() -> None:
    def sleeping(seconds: float, code: int) -> subprocess.Popen[bytes]:
        script = f"import time; time.sleep({seconds}); raise SystemExit({code})"
        return subprocess.Popen([sys.executable, "-c", script])

    for first, timeout_s, expected in (((0, 3), 60, [3, None]), ((60, 0), 0.2, [None, None])):
        processes = [sleeping(*first), sleeping(60, 0)]
        assert wait_for(processes, timeout_s) == expected
        assert all(process.returncode is not None for process in processes)
