"""The host backend without memory: the real manager over slots of nothing, and jobs that end at once.

For replays and measurements of what is decided, where moving bytes would only take time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast, final

from jaxkv.host_pool import HostPool
from jaxkv.keys import JobId
from jaxkv.offload.base import JobResult, OffloadingManager, OffloadingSpec, OffloadingWorker, TransferJob
from jaxkv.offload.host import HostOffloadingSpec
from jaxkv.offload.options import BackendOptions
from jaxkv.testing.fake_pool import FakePool


@final
class InstantWorker(OffloadingWorker):
    """Every job has ended, well, when it is submitted."""

    def __init__(self) -> None:
        self._results: list[JobResult] = []

    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        """See ``OffloadingWorker``."""
        del kv_caches
        self._results.append(JobResult(job.job_id, 0, 0.0))

    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        """See ``OffloadingWorker``."""
        self._results.append(JobResult(job.job_id, 0, 0.0))
        return kv_caches

    def get_finished(self) -> list[JobResult]:
        """See ``OffloadingWorker``."""
        taken, self._results = self._results, []
        return taken

    def wait(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``; nothing is under way."""

    def shutdown(self) -> None:
        """See ``OffloadingWorker``."""


@final
class InstantSpec(OffloadingSpec):
    """``HostOffloadingSpec``'s manager, policies and division into slabs, and an ``InstantWorker``."""

    def __init__(self, options: BackendOptions) -> None:
        # A fake pool does all that the manager asks of a pool; only a real worker would want its memory.
        self._host = HostOffloadingSpec(options, pool=cast(HostPool, FakePool(options.host_bytes)))

    def get_manager(self) -> OffloadingManager:
        """See ``OffloadingSpec``."""
        return self._host.get_manager()

    def get_worker(self, kv_caches: Any) -> InstantWorker:
        """See ``OffloadingSpec``."""
        del kv_caches
        return InstantWorker()

    def shutdown(self) -> None:
        """See ``OffloadingSpec``."""
        self._host.shutdown()


INSTANT_BACKEND = f"{__name__}.{InstantSpec.__qualname__}"
"""Name of this backend for ``OffloadingConfig.backend``."""
