"""The counters of connectors for Prometheus. Needs the extra ``metrics``: ``pip install jaxkv[metrics]``.

Reads what ``get_stats`` answers when Prometheus asks; serving pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate
from typing import Any, Protocol, final

from jaxkv.connector.histogram import HistogramStats
from jaxkv.connector.lookup import Deferral
from jaxkv.connector.metrics import ConnectorStats, GroupStats
from jaxkv.connector.store_plan import SkipReason
from jaxkv.errors import ConnectorStateError

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "jaxkv.prometheus needs the package prometheus-client; install jaxkv[metrics]", name=missing.name
    ) from missing

_PREFIX = "jaxkv_kv_offload_"

_Count = Callable[[GroupStats], float]
_GROUP_COUNTERS: Mapping[str, tuple[str, _Count]] = {
    "store_bytes": ("Bytes stored from the device.", lambda group: group.stored_bytes),
    "load_bytes": ("Bytes loaded to the device.", lambda group: group.loaded_bytes),
    "store_chunks": ("Chunks stored.", lambda group: group.stored_chunks),
    "load_chunks": ("Chunks loaded.", lambda group: group.loaded_chunks),
    "hit_chunks": ("Chunks that loads were started for.", lambda group: group.hit_chunks),
    "evicted_chunks": ("Chunks evicted to make room.", lambda group: group.evicted_chunks),
}
_COUNTERS: Mapping[str, tuple[str, Callable[[ConnectorStats], float]]] = {
    "jaxkv_kv_offload_store_time_seconds": (
        "Seconds that stores took, summed over jobs.",
        lambda stats: stats.store_seconds,
    ),
    "jaxkv_kv_offload_load_time_seconds": (
        "Seconds that loads took, summed over jobs.",
        lambda stats: stats.load_seconds,
    ),
    "jaxkv_external_prefix_cache_queries": (
        "Tokens that admitted requests did not find on the device.",
        lambda stats: stats.queried_tokens,
    ),
    "jaxkv_external_prefix_cache_hits": (
        "Tokens among them that were loaded.",
        lambda stats: stats.hit_tokens,
    ),
}
_HISTOGRAMS: Mapping[str, tuple[str, Callable[[ConnectorStats], HistogramStats]]] = {
    "store_size_bytes": ("Bytes of one store.", lambda stats: stats.store_sizes),
    "load_size_bytes": ("Bytes of one load.", lambda stats: stats.load_sizes),
    "lookup_sync_delay_seconds": ("Seconds of one lookup.", lambda stats: stats.lookup_seconds),
    "lookup_async_delay_seconds": (
        "Seconds from a request's first deferred lookup to its answer, or to the request's end.",
        lambda stats: stats.wait_seconds,
    ),
}


class StatsSource(Protocol):
    """Has counters, as ``OffloadingConnector`` does."""

    def get_stats(self) -> ConnectorStats:
        """All counters as they stand; called from the thread that serves Prometheus."""


@final
class ConnectorCollector(Collector):
    """Metrics of ``connectors``, by the name that the label ``engine`` gets.

    To be registered once, with all connectors of the process: ``REGISTRY.register(ConnectorCollector(...))``.
    A connector that was shut down drops out.
    """

    def __init__(self, connectors: Mapping[str, StatsSource]) -> None:
        self._connectors = dict(connectors)

    def collect(self) -> Iterator[Metric]:
        """One family for each metric, with the samples of all connectors."""
        found: list[tuple[str, ConnectorStats]] = []
        for engine, connector in self._connectors.items():
            try:
                found.append((engine, connector.get_stats()))
            except ConnectorStateError:
                continue
        yield from _of_groups(found)
        yield from _of_connectors(found)
        yield from _of_backends(found)


_Found = Sequence[tuple[str, ConnectorStats]]


def _of_groups(found: _Found) -> Iterator[Metric]:
    groups = [
        ((engine, str(index), group.kind), group)
        for engine, stats in found
        for index, group in enumerate(stats.groups)
    ]
    labels = ("engine", "group", "kind")
    for name, (about, count) in _GROUP_COUNTERS.items():
        yield _counter(_PREFIX + name, about, labels, ((names, count(group)) for names, group in groups))
    failed = [
        ((*names, operation), count)
        for names, group in groups
        for operation, count in (("store", group.failed_store_chunks), ("load", group.failed_load_chunks))
    ]
    about = "Chunks whose store or load failed."
    yield _counter(_PREFIX + "failed_chunks", about, (*labels, "operation"), failed)
    skipped = [
        ((*names, reason.value), group.skipped_chunks.get(reason, 0))
        for names, group in groups
        for reason in SkipReason
    ]
    about = "Complete chunks that were not stored, by reason."
    yield _counter(_PREFIX + "skipped_chunks", about, (*labels, "reason"), skipped)


def _of_connectors(found: _Found) -> Iterator[Metric]:
    for name, (about, count) in _COUNTERS.items():
        yield _counter(name, about, ("engine",), (((engine,), count(stats)) for engine, stats in found))
    deferred = [
        ((engine, reason.value), stats.deferred.get(reason, 0))
        for engine, stats in found
        for reason in Deferral
    ]
    about = "Lookups that told a request to ask again, by reason."
    yield _counter(_PREFIX + "deferred_lookups", about, ("engine", "reason"), deferred)
    for name, (about, histogram) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(_PREFIX + name, about, labels=("engine",))
        for engine, stats in found:
            values = histogram(stats)
            bounds = [*map(repr, map(float, values.bounds)), "+Inf"]
            counts = accumulate(values.counts)
            family.add_metric((engine,), list(zip(bounds, counts, strict=True)), values.total)
        yield family


def _of_backends(found: _Found) -> Iterator[Metric]:
    """A gauge for each number among the backend's own counters, under the name it has there."""
    families: dict[str, GaugeMetricFamily] = {}
    for engine, stats in found:
        for name, value in _numbers(stats.backend):
            if name not in families:
                about = f"{name} of {type(stats.backend).__name__}."
                families[name] = GaugeMetricFamily(f"{_PREFIX}backend_{name}", about, labels=("engine",))
            families[name].add_metric((engine,), value)
    yield from families.values()


def _numbers(record: Any) -> Iterator[tuple[str, float]]:
    if isinstance(record, Mapping):
        values = dict(record)
    elif is_dataclass(record):
        values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    else:
        values = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value


def _counter(
    name: str, about: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family
