"""The check that closes a test: nothing runs, so nothing is held."""

from __future__ import annotations

from jaxkv.connector import OffloadingConnector


def assert_no_leaks(connector: OffloadingConnector) -> None:
    """Asserts that no job, pin, slot or request state is left once the loop is idle."""
    leaks = connector.leaks()
    assert not leaks, "\n".join(["the connector still holds:", *leaks])
    assert not connector.has_pending_push_work()
    assert not connector.has_pending_block_frees()
