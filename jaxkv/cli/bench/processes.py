"""Runs a measurement in a fresh process: memory that nothing touched yet, or fewer processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def run_fresh(cpus: Collection[int] | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a process of its own, kept to ``cpus`` from the start unless ``None``."""
    spawn = multiprocessing.get_context("spawn")
    keep = (os.sched_setaffinity, (0, set(cpus))) if cpus is not None else (None, ())
    with ProcessPoolExecutor(1, spawn, *keep) as process:
        return process.submit(function, *args, **kwargs).result()
