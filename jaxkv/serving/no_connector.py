"""The connector of an engine that offloads nothing, so that the loop has one path for both."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, final

from jaxkv.connector.base import (
    KVCaches,
    KVConnectorBase,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorWorkerMetadata,
)
from jaxkv.connector.protocols import BlockTables, Request, SchedulerOutput
from jaxkv.keys import BlockId


@final
class _NoMetadata(KVConnectorMetadata):
    pass


@final
class NoConnector(KVConnectorBase):
    """Holds nothing, finds nothing, returns the caches as they are."""

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing beyond the device hit."""
        del request, num_computed_tokens
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: BlockTables, num_external_tokens: int
    ) -> None:
        """Nothing to keep."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Empty metadata."""
        del scheduler_output
        return _NoMetadata()

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Nothing was transferred."""

    def request_finished(
        self, request: Request, block_ids: Sequence[BlockId | None]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once."""
        del request, block_ids
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: BlockTables
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once."""
        del request, block_ids
        return False, None

    def register_kv_caches(self, kv_caches: KVCaches) -> None:
        """Nothing to learn."""

    def handle_preemptions(self, kv_caches: KVCaches, metadata: KVConnectorMetadata) -> KVCaches:
        """No stores."""
        del metadata
        return kv_caches

    def bind_connector_metadata(self, metadata: KVConnectorMetadata) -> None:
        """Nothing to bind."""

    def start_load_kv(self, kv_caches: KVCaches) -> KVCaches:
        """No loads."""
        return kv_caches

    def wait_for_save(self, kv_caches: KVCaches) -> KVCaches:
        """No stores."""
        return kv_caches

    def get_finished(self, finished_req_ids: Set[str]) -> tuple[Set[str], Set[str]]:
        """Nothing was sent or received."""
        del finished_req_ids
        return frozenset(), frozenset()

    def get_transfer_results(self, finished_req_ids: Set[str]) -> KVConnectorOutput:
        """Nothing was sent or received."""
        del finished_req_ids
        return KVConnectorOutput()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Nothing to report."""
        return None

    def clear_connector_metadata(self) -> None:
        """Nothing to forget."""

    def shutdown(self) -> None:
        """Nothing to end."""
