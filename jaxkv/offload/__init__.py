"""Backends: where offloaded chunks are kept, and how they get there."""

from jaxkv.offload.base import (
    DeviceBlocks,
    JobResult,
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    OffloadPolicy,
    PrefixLookup,
    PrepareStoreOutput,
    ReqContext,
    StepStoreOutput,
    TransferJob,
)
from jaxkv.offload.factory import make_offloading_spec
from jaxkv.offload.options import BackendOptions
from jaxkv.offload.policies import CachePolicy

__all__ = [
    "BackendOptions",
    "CachePolicy",
    "DeviceBlocks",
    "JobResult",
    "LoadStoreSpec",
    "LookupResult",
    "OffloadPolicy",
    "OffloadingEvent",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "PrefixLookup",
    "PrepareStoreOutput",
    "ReqContext",
    "StepStoreOutput",
    "TransferJob",
    "make_offloading_spec",
]
