"""Names a shared host pool for other processes. Opens nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from jaxkv.errors import ConfigError

_NONCE = re.compile(r"[0-9a-f]{32}")


@final
@dataclass(frozen=True, slots=True)
class PoolHandle:
    """The shared pool that process ``pid`` has open as file descriptor ``fd``; ``HostPool.handle`` makes it.

    It finds the pool from processes of the same host, pid namespace and user, as long as the owner lives and
    has not closed the pool. ``nonce`` (32 hex digits) is new for every pool, so that another file, or another
    process of that number, is never taken for it. It pickles; as JSON it is
    ``dataclasses.asdict(handle)``, and ``PoolHandle(**fields)`` once read.

    Raises ``ConfigError`` for values that no pool can have.
    """

    pid: int
    fd: int
    capacity_bytes: int
    nonce: str

    def __post_init__(self) -> None:
        for name, least, limit in (("pid", 1, 2**31), ("fd", 0, 2**31), ("capacity_bytes", 1, 2**63)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < limit:
                raise ConfigError(f"a pool handle cannot have {name}={value!r}; use the owner's pool.handle")
        if not isinstance(self.nonce, str) or not _NONCE.fullmatch(self.nonce):
            raise ConfigError(f"a pool handle cannot have nonce={self.nonce!r}; use the owner's pool.handle")
