"""Finds backends by name or dotted path."""

from __future__ import annotations

from collections.abc import Callable

from jaxkv.errors import ConfigError
from jaxkv.offload.base import OffloadingSpec
from jaxkv.offload.options import BackendOptions
from jaxkv.offload.policies import load_class


def _make_host(options: BackendOptions) -> OffloadingSpec:
    from jaxkv.offload.host import HostOffloadingSpec  # noqa: PLC0415 - other backends need no native code

    return HostOffloadingSpec(options)


_BACKENDS: dict[str, Callable[[BackendOptions], OffloadingSpec]] = {"host": _make_host}


def make_offloading_spec(name: str, options: BackendOptions) -> OffloadingSpec:
    """The backend called ``name``: ``"host"``, or the dotted path of an ``OffloadingSpec``.

    A class is called with ``options`` alone. Raises ``ConfigError`` for a name that is neither.
    """
    if name in _BACKENDS:
        return _BACKENDS[name](options)
    backend = load_class(name, OffloadingSpec, f"backend: one of {sorted(_BACKENDS)}")
    made = backend(options)
    if not isinstance(made, OffloadingSpec):
        raise ConfigError(f"{name!r} made {made!r}, which is no OffloadingSpec")
    return made
