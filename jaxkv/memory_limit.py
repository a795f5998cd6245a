"""How much memory this process may use: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The smallest of physical memory and the limits of all control groups (v1 and v2) the process is in.

    ``root`` is where ``proc`` and ``sys`` are looked for. Limits that cannot be read count as absent.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _limit_files(root):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _limit_files(root: Path) -> list[Path]:
    """The limit files of the process's groups and of all groups above them."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = mounts, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mounts / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        files += [base / part / name for part in (path, *path.parents)]
    return files
