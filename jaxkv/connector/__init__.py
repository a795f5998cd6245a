"""vLLM's KV connector API for JAX serving loops."""

from jaxkv.connector.aggregate import KVOutputAggregator
from jaxkv.connector.base import (
    KVCaches,
    KVConnectorBase,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorWorkerMetadata,
    LoadFailure,
)
from jaxkv.connector.config import OffloadingConfig
from jaxkv.connector.connector import OffloadingConnector
from jaxkv.connector.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    event_to_json,
)
from jaxkv.connector.histogram import HistogramStats
from jaxkv.connector.metrics import ConnectorStats, GroupStats
from jaxkv.connector.protocols import BlockTables, PartialTailOffload, Request, SchedulerOutput
from jaxkv.connector.sizes import parse_bytes
from jaxkv.connector.worker import OffloadingConnectorWorker

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "BlockTables",
    "ConnectorStats",
    "GroupStats",
    "HistogramStats",
    "KVCacheEvent",
    "KVCaches",
    "KVConnectorBase",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorWorkerMetadata",
    "KVOutputAggregator",
    "LoadFailure",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorWorker",
    "PartialTailOffload",
    "Request",
    "SchedulerOutput",
    "event_to_json",
    "parse_bytes",
]
