"""How much memory this process can still get: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_memory_bytes(root: Path = Path("/")) -> int:
    """The least of what the machine and all control groups (v1 and v2) of the process have left.

    File pages that can be dropped, and swap, count as left. ``root`` is where ``proc`` and ``sys`` are looked
    for. What cannot be read counts as absent.
    """
    machine = _read_table(root / "proc/meminfo")
    left = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if "MemAvailable:" in machine:
        left.append(1024 * (machine["MemAvailable:"] + machine.get("SwapFree:", 0)))
    for directory, version in _memory_groups(root):
        left += _left_in_group(directory, version)
    return max(0, min(left))


def _left_in_group(directory: Path, version: int) -> list[int]:
    """The bytes left in one group, if it has a limit."""
    limit_file, usage_file, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    limit = _read(directory / limit_file)
    if not limit.isdigit():
        return []
    usage = _read(directory / usage_file)
    held = _read_table(directory / "memory.stat")
    droppable = held.get(f"{prefix}inactive_file", 0) + held.get(f"{prefix}active_file", 0)
    return [int(limit) - max(0, int(usage) - droppable if usage.isdigit() else 0)]


def _memory_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The directories of the process's groups and of all groups above them, each with its version."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, version = mounts, 2
        elif "memory" in controllers.split(","):
            base, version = mounts / "memory", 1
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        for part in (path, *path.parents):
            yield base / part, version


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_table(path: Path) -> dict[str, int]:
    """Lines of a name and a whole number, whatever follows it."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
