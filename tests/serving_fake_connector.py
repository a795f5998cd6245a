"""An in-memory connector for the tests of the loop: NumPy pages, delays and failures on command.

It also checks the loop: calls in the right order, no block handed out while a load writes to it, and pages of
a load that has not landed hold poison, so that whoever reads them early computes wrong tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, takewhile

import jax.numpy as jnp
import numpy as np

from jaxkv.connector.base import (
    KVConnectorBase,
    KVConnectorMetadata,
    KVConnectorOutput,
    LoadFailure,
)
from jaxkv.hits import HitGroup, longest_hit, required_chunks
from jaxkv.keys import GroupId, make_offload_key
from jaxkv.spec import MambaSpec

POISON = 0xABCDABCD
STEP = ["meta", "preemptions", "bind", "load", "save", "results", "worker_meta", "clear", "update"]


@dataclass
class FakeMeta(KVConnectorMetadata):
    stores: list
    loads: list


@dataclass
class Tracked:
    request: object
    tables: list
    stored: set = field(default_factory=set)


@dataclass
class Load:
    request_id: str
    pages: list  # (group, block, key)
    steps_left: int
    fails: bool


class HostChunks:
    """Which chunks of a request the fake connector holds."""

    def __init__(self, connector, request):
        self.connector = connector
        self.request = request

    def count_leading(self, group, chunks):
        key = self.connector._key
        return sum(1 for _ in takewhile(lambda i: key(self.request, group, i) in self.connector.host, chunks))

    def count_trailing(self, group, chunks):
        return self.count_leading(group, chunks[::-1])


class FakeConnector(KVConnectorBase):
    """``load_steps=None`` loads in the step itself; a number delays the landing by so many steps."""

    def __init__(self, config, *, load_steps=0, fail_loads=0, hesitate=0):
        self.groups = [HitGroup(group.spec, group.block_size) for group in config.groups]
        self.names = [group.layer_names[0] for group in config.groups]
        self.config = config
        self.load_steps = load_steps
        self.fail_loads = fail_loads
        self.hesitate = hesitate
        self.host = {}
        self.loaded_pages = 0
        self.calls = []
        self.tracked = {}
        self.ended = {}
        self.promised = {}
        self.planned = []
        self.in_flight = []
        self.results = []

    # -- scheduler side

    def _key(self, request, group, index):
        per_block = self.groups[group].tokens_per_chunk // self.config.hash_block_size
        return make_offload_key(request.block_hashes[(index + 1) * per_block - 1], GroupId(group))

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if self.hesitate:
            self.hesitate -= 1
            return None, False
        hit = longest_hit(
            self.groups,
            num_computed_tokens,
            request.num_tokens - 1,
            self.config.alignment_tokens,
            HostChunks(self, request),
        )
        self.promised[request.request_id] = (num_computed_tokens, hit)
        return hit - num_computed_tokens, self.load_steps is not None

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        busy = self._busy_blocks()
        flat = {(g, b) for g, table in enumerate(blocks) for b in table if b is not None}
        assert not flat & busy, "a block was handed out while a load writes to it"
        stored = self.tracked[request.request_id].stored if request.request_id in self.tracked else set()
        self.tracked[request.request_id] = Tracked(request, [list(table) for table in blocks], stored)
        if num_external_tokens:
            known, hit = self.promised[request.request_id]
            pages = []
            for group, spec in enumerate(self.groups):
                for index in chain.from_iterable(required_chunks(spec, hit)):
                    if index >= known // spec.tokens_per_chunk:
                        assert blocks[group][index] is not None
                        key = self._key(request, group, index)
                        pages.append((group, blocks[group][index], key))
            self.planned.append(Load(request.request_id, pages, self.load_steps or 0, self.fail_loads > 0))
            self.fail_loads = max(0, self.fail_loads - 1)

    def build_connector_meta(self, scheduler_output):
        self.calls.append("meta")
        stores = []
        for request_id in scheduler_output.preempted_req_ids:
            self.tracked.pop(request_id, None)
        for tracked in self.tracked.values():
            stores += self._plan_stores(tracked)
        for tracked in self.ended.values():
            stores += self._plan_stores(tracked)
        assert set(self.ended) <= scheduler_output.finished_req_ids
        self.ended = {}
        busy = self._busy_blocks()
        for request_id, tables in scheduler_output.new_block_ids.items():
            for group, table in enumerate(tables):
                assert not {(group, block) for block in table} & busy
                self.tracked[request_id].tables[group] += table
        meta = FakeMeta(stores, self.planned)
        self.planned = []
        return meta

    def _plan_stores(self, tracked):
        request = tracked.request
        if any(load.request_id == request.request_id for load in self.planned + self.in_flight):
            return []
        stores = []
        for group, spec in enumerate(self.groups):
            done = request.num_computed_tokens // spec.tokens_per_chunk
            aligned = request.num_computed_tokens % spec.tokens_per_chunk == 0
            first = 0 if not isinstance(spec.spec, MambaSpec) else max(0, done - 1) if aligned else done
            for index in range(first, done):
                key = self._key(request, group, index)
                if (group, index) in tracked.stored or index >= len(tracked.tables[group]):
                    continue
                tracked.stored.add((group, index))
                if tracked.tables[group][index] is not None:
                    stores.append((group, tracked.tables[group][index], key))
        return stores

    def request_finished(self, request, block_ids):
        raise AssertionError("hybrid loops call request_finished_all_groups")

    def request_finished_all_groups(self, request, block_ids):
        tracked = self.tracked.pop(request.request_id, None)
        loads = any(load.request_id == request.request_id for load in self.planned + self.in_flight)
        if tracked is not None and not loads:
            self.ended[request.request_id] = tracked
        return loads, None

    def update_connector_output(self, output):
        self.calls.append("update")

    def has_pending_push_work(self):
        return bool(self.ended or self.planned or self.in_flight or self.results)

    def _busy_blocks(self):
        return {(g, b) for load in self.planned + self.in_flight for g, b, _ in load.pages}

    # -- worker side

    def register_kv_caches(self, kv_caches):
        assert set(kv_caches) == set(self.names)

    def handle_preemptions(self, kv_caches, metadata):
        self.calls.append("preemptions")
        for group, block, key in metadata.stores:
            page = self._read(kv_caches, group, block)
            if key in self.host:
                for old, new in zip(self.host[key], page, strict=True):
                    np.testing.assert_array_equal(old, new, "one key names two contents")
            self.host[key] = page
        return kv_caches

    def bind_connector_metadata(self, metadata):
        self.calls.append("bind")
        self.metadata = metadata

    def start_load_kv(self, kv_caches):
        self.calls.append("load")
        for load in self.metadata.loads:
            self.in_flight.append(load)
            kv_caches = self._write(kv_caches, [(group, block, None) for group, block, _ in load.pages])
        for load in list(self.in_flight):
            load.steps_left -= 1
            if load.steps_left < 0:
                self.in_flight.remove(load)
                self.results.append(load)
                if not load.fails:
                    kv_caches = self._write(kv_caches, load.pages)
                    self.loaded_pages += len(load.pages)
        return kv_caches

    def wait_for_save(self, kv_caches):
        self.calls.append("save")
        return kv_caches

    def get_finished(self, finished_req_ids):
        return set(), set()

    def get_transfer_results(self, finished_req_ids):
        self.calls.append("results")
        failed = {
            load.request_id: LoadFailure(tuple((GroupId(g), b) for g, b, _ in load.pages), "told to fail")
            for load in self.results
            if load.fails
        }
        output = KVConnectorOutput(
            finished_recving={load.request_id for load in self.results}, failed_recving=failed
        )
        self.results = []
        return output

    def build_connector_worker_meta(self):
        self.calls.append("worker_meta")

    def clear_connector_metadata(self):
        self.calls.append("clear")
        self.metadata = None

    def shutdown(self):
        assert not self.has_pending_push_work()

    # -- pages

    def _leaves(self, kv_caches, group):
        leaf = kv_caches[self.names[group]]
        return leaf if isinstance(leaf, tuple) else (leaf,)

    def _read(self, kv_caches, group, block):
        return [np.array(_page(leaf, block)) for leaf in self._leaves(kv_caches, group)]

    def _write(self, kv_caches, pages):
        caches = dict(kv_caches)
        for group, block, key in pages:
            leaves = self._leaves(caches, group)
            values = [POISON] * len(leaves) if key is None else self.host[key]
            new = tuple(_set_page(leaf, block, value) for leaf, value in zip(leaves, values, strict=True))
            caches[self.names[group]] = new if isinstance(caches[self.names[group]], tuple) else new[0]
        return caches


def _page(leaf, block):
    return leaf[:, block] if leaf.ndim == 3 else leaf[block]


def _set_page(leaf, block, value):
    copy = np.array(leaf)
    copy[(slice(None), block) if leaf.ndim == 3 else block] = value
    return jnp.asarray(copy)
