"""Finds packages whose allocation code is tested, without what they import and do not need for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def require(package: str) -> str:
    """The folder of an installed package, which is not imported; without it the test or module is skipped."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; make test-families installs it", allow_module_level=True)
    return next(iter(spec.submodule_search_locations))


@contextmanager
def hollow(*packages: str, given: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, ``packages`` can be imported from without running their ``__init__``.

    Those pull in whole serving stacks and change the environment. ``given`` maps further module names to what
    stands for them. Afterwards ``sys.modules`` is as before, so nothing else sees what was made up.
    """
    before = dict(sys.modules)
    folders = {name: require(name.partition(".")[0]) for name in packages}
    for name, folder in folders.items():
        made = ModuleType(name)
        made.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        sys.modules[name] = made
    sys.modules.update(given or {})
    tops = {name.partition(".")[0] for name in (*packages, *(given or {}))}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def module(name: str, **attributes: Any) -> ModuleType:
    """A module with these attributes and nothing else."""
    made = ModuleType(name)
    vars(made).update(attributes)
    return made
