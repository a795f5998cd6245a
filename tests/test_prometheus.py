"""What Prometheus reads is what the connector counted."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from connector_loop import Loop
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from jaxkv.connector.lookup import Deferral
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.store_plan import SkipReason
from jaxkv.errors import ConnectorStateError
from jaxkv.prometheus import ConnectorCollector

PROMPT = list(range(40))
DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def loop():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.serve("second", PROMPT)
    yield loop
    loop.close()


def scrape(connectors):
    """All samples: name and labels to value."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(ConnectorCollector(connectors))
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples, name, **labels):
    return samples[f"jaxkv_{name}", *sorted({"engine": "0", **labels}.items())]


def test_counters_come_per_group_with_the_kind_of_its_layers(loop):
    samples, stats = scrape({"0": loop.connector}), loop.connector.get_stats()
    assert stats.loaded_bytes > 0
    kinds = ["full_attention", "sliding_window", "mamba"]
    for index, (kind, group) in enumerate(zip(kinds, stats.groups, strict=True)):
        where = {"group": str(index), "kind": kind}
        assert of(samples, "kv_offload_store_bytes_total", **where) == group.stored_bytes
        assert of(samples, "kv_offload_load_bytes_total", **where) == group.loaded_bytes
        assert of(samples, "kv_offload_store_chunks_total", **where) == group.stored_chunks
        assert of(samples, "kv_offload_load_chunks_total", **where) == group.loaded_chunks
        assert of(samples, "kv_offload_hit_chunks_total", **where) == group.hit_chunks
        assert of(samples, "kv_offload_evicted_chunks_total", **where) == group.evicted_chunks
        for reason in SkipReason:
            skipped = of(samples, "kv_offload_skipped_chunks_total", reason=reason.value, **where)
            assert skipped == group.skipped_chunks[reason]
        for operation in ("store", "load"):
            assert of(samples, "kv_offload_failed_chunks_total", operation=operation, **where) == 0


def test_counters_of_the_connector_and_its_backend_are_there(loop):
    samples, stats = scrape({"0": loop.connector}), loop.connector.get_stats()
    assert of(samples, "kv_offload_store_time_seconds_total") == pytest.approx(stats.store_seconds)
    assert of(samples, "kv_offload_load_time_seconds_total") == pytest.approx(stats.load_seconds)
    assert of(samples, "external_prefix_cache_hits_total") == stats.hit_tokens > 0
    assert of(samples, "external_prefix_cache_queries_total") == stats.queried_tokens
    for reason in Deferral:
        assert of(samples, "kv_offload_deferred_lookups_total", reason=reason.value) == stats.deferred[reason]
    assert of(samples, "kv_offload_backend_num_chunks") == stats.backend.num_chunks > 0
    assert of(samples, "kv_offload_backend_used_bytes") == stats.backend.used_bytes


def test_histograms_count_up_to_each_bound(loop):
    samples, stats = scrape({"0": loop.connector}), loop.connector.get_stats()
    name = "kv_offload_store_size_bytes"
    below = 0
    for bound, count in zip(
        (*map(repr, stats.store_sizes.bounds), "+Inf"), stats.store_sizes.counts, strict=True
    ):
        below += count
        assert of(samples, f"{name}_bucket", le=bound) == below
    assert of(samples, f"{name}_count") == stats.store_sizes.num_values > 0
    assert of(samples, f"{name}_sum") == stats.store_sizes.total


def test_a_snapshot_with_every_counter_set_is_told_in_full(loop):
    """No counter is left out, and none is told under another's name."""
    stats = loop.connector.get_stats()
    group = stats.groups[0]
    numbers = iter(range(1001, 1100))
    for name in ("stored", "loaded"):
        setattr(group, f"{name}_bytes", next(numbers))
    for name in ("stored", "loaded", "hit", "failed_store", "failed_load", "evicted"):
        setattr(group, f"{name}_chunks", next(numbers))
    for reason in SkipReason:
        group.skipped_chunks[reason] = next(numbers)

    class Source:
        def get_stats(self):
            return stats

    told = [value for key, value in scrape({"0": Source()}).items() if ("group", "0") in key]
    assert sorted(told) == list(range(1001, next(numbers)))


def test_several_connectors_are_told_apart_and_one_that_was_shut_down_drops_out(loop):
    other = Loop()
    other.serve("a", PROMPT[:8])
    both = scrape({"0": loop.connector, "1": other.connector})
    assert {dict(key[1:])["engine"] for key in both} == {"0", "1"}
    other.close()
    with pytest.raises(ConnectorStateError):
        other.connector.get_stats()
    assert scrape({"0": loop.connector, "1": other.connector}) == scrape({"0": loop.connector})


@pytest.mark.parametrize("backend", [None, object(), {"depth": 2, "name": "x", "on": True}])
def test_any_backend_may_have_counters_of_any_kind(loop, backend):
    class Source:
        def get_stats(self):
            return Metrics(loop.connector._open_scheduler._caches).snapshot(backend)

    told = {key[0]: value for key, value in scrape({"0": Source()}).items() if "backend" in key[0]}
    assert told == ({"jaxkv_kv_offload_backend_depth": 2} if isinstance(backend, dict) else {})


def test_the_docs_list_every_metric_and_no_other(loop):
    registry = CollectorRegistry(auto_describe=True)
    registry.register(ConnectorCollector({"0": loop.connector}))
    told = {family.name for family in registry.collect() if "_backend_" not in family.name}
    listed = set(re.findall(r"^\| `(jaxkv_\w+?)(?:_total)?` ", DOCS.read_text(), re.MULTILINE))
    assert listed - {"jaxkv_kv_offload_backend_"} == told


def test_the_example_of_the_docs_serves_metrics(loop):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    servers = []

    registry = CollectorRegistry(auto_describe=True)

    def start(port):
        servers.append(start_http_server(0, addr="127.0.0.1", registry=registry))

    snippet = snippet.replace("from prometheus_client import REGISTRY, start_http_server\n", "")
    names = {"connector": loop.connector, "REGISTRY": registry, "start_http_server": start}
    exec(snippet, names)
    ((server, thread),) = servers
    try:
        text = urlopen(f"http://127.0.0.1:{server.server_port}/metrics").read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert 'jaxkv_kv_offload_load_bytes_total{engine="0",group="0",kind="full_attention"}' in text
