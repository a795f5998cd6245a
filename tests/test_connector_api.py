"""The connector's edges: options, misuse, the order of calls, metrics and events."""

import numpy as np
import pytest
from connector_loop import Loop, LoopRequest, hybrid_config, make_caches

from jaxkv.connector import (
    AllBlocksCleared,
    KVConnectorMetadata,
    KVConnectorOutput,
    OffloadingConfig,
    OffloadingConnector,
    SchedulerOutput,
    parse_bytes,
)
from jaxkv.errors import ConfigError, ConnectorStateError, PoolInUseError, RequestError
from jaxkv.offload import BackendOptions, make_offloading_spec
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec
from jaxkv.testing.leaks import assert_no_leaks

PROMPT = list(range(40))


def make_connector(config=None):
    config = config or hybrid_config()
    spec = FakeOffloadingSpec(config, FakePool(1 << 16))
    return OffloadingConnector(OffloadingConfig(host_bytes=1), config, spec=spec)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [(7, 7), ("7", 7), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2kb", 2000), (" 3 B ", 3)],
)
def test_size_is_read_as_written(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "12 parsecs", "1.5", "0", 0, -4, True, None, 1.5])
def test_unreadable_size_is_named(text):
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown connector options \['host_byte'\].*host_bytes.*eviction"):
        OffloadingConfig.from_dict({"host_byte": 1})


def test_missing_size_of_the_pool_is_named():
    with pytest.raises(ConfigError, match="host_bytes"):
        OffloadingConfig.from_dict({"blocks_per_chunk": 1})


def test_options_are_read_from_a_dict():
    config = OffloadingConfig.from_dict({"host_bytes": "1KiB", "offload_prompt_only": False})
    assert (config.host_bytes, config.offload_prompt_only) == (1024, False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("blocks_per_chunk", 0),
        ("blocks_per_chunk", -1),
        ("blocks_per_chunk", 1.5),
        ("num_workers", 0),
        ("num_workers", True),
        ("store_threshold", -1),
        ("store_threshold", "2"),
        ("retention_interval", -1),
        ("retention_interval", 0.5),
    ],
)
def test_an_option_out_of_range_is_refused_by_name_and_value(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be .*{value!r}"):
        OffloadingConfig.from_dict({"host_bytes": 1, option: value})


def test_events_cannot_describe_themselves_where_there_are_none():
    with pytest.raises(ConfigError, match="enable_events"):
        OffloadingConfig(host_bytes=1, self_describing_events=True)


@pytest.mark.parametrize("name", ["disk", "no_such_module.Spec", "builtins.dict"])
def test_unknown_backend_is_named_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"{name}.*host"):
        make_offloading_spec(name, BackendOptions(hybrid_config(), 1 << 16))


def test_worker_calls_before_registration_are_named():
    with make_connector() as connector:
        metadata = connector.build_connector_meta(SchedulerOutput())
        with pytest.raises(ConnectorStateError, match="register_kv_caches"):
            connector.handle_preemptions({}, metadata)


def test_registering_twice_is_named():
    config = hybrid_config()
    with make_connector(config) as connector:
        connector.register_kv_caches(make_caches(config))
        with pytest.raises(ConnectorStateError, match="registered already"):
            connector.register_kv_caches(make_caches(config))


def test_load_without_metadata_is_named():
    config = hybrid_config()
    with make_connector(config) as connector:
        connector.register_kv_caches(make_caches(config))
        with pytest.raises(ConnectorStateError, match="bind_connector_metadata"):
            connector.start_load_kv({})


def test_metadata_of_another_connector_is_named():
    with make_connector() as connector, pytest.raises(ConnectorStateError, match="Foreign"):
        connector.bind_connector_metadata(type("Foreign", (KVConnectorMetadata,), {})())


def test_use_after_shutdown_is_named():
    connector = make_connector()
    connector.shutdown()
    connector.shutdown()
    request = LoopRequest("late", PROMPT)
    for call in (
        lambda: connector.on_new_request(request),
        lambda: connector.get_num_new_matched_tokens(request, 0),
        lambda: connector.build_connector_meta(SchedulerOutput()),
        lambda: connector.register_kv_caches({}),
        lambda: connector.get_finished(set()),
        connector.reset_cache,
        connector.get_stats,
    ):
        with pytest.raises(ConnectorStateError, match="shut down"):
            call()


def test_backend_belongs_to_one_connector_at_a_time():
    config = hybrid_config()
    spec = FakeOffloadingSpec(config, FakePool(1 << 16))
    options = OffloadingConfig(host_bytes=1)
    first = OffloadingConnector(options, config, spec=spec)
    with pytest.raises(PoolInUseError, match="another connector"):
        OffloadingConnector(options, config, spec=spec)
    first.shutdown()
    OffloadingConnector(options, config, spec=spec).shutdown()


def test_request_id_in_use_is_named():
    with make_connector() as connector:
        connector.on_new_request(LoopRequest("twice", PROMPT))
        with pytest.raises(RequestError, match="twice"):
            connector.on_new_request(LoopRequest("twice", PROMPT))


def test_tokens_that_were_not_promised_are_named():
    with make_connector() as connector, pytest.raises(RequestError, match="promised 0 tokens"):
        connector.update_state_after_alloc(LoopRequest("greedy", PROMPT), [[], [], []], 8)


@pytest.mark.parametrize("window", [[None] * 5 + [0, 1, None], [None] * 5 + [0, 1]])
def test_hit_without_a_block_to_load_into_is_named(window):
    loop = Loop()
    loop.serve("first", PROMPT)
    second = LoopRequest("second", PROMPT)
    assert loop.connector.get_num_new_matched_tokens(second, 0) == (32, True)
    tables = [list(range(8)), window, [None] * 3 + [1]]
    with pytest.raises(RequestError, match="group 1 has no block at position 7"):
        loop.connector.update_state_after_alloc(second, tables, 32)
    tables[1][7:] = [2]
    loop.connector.update_state_after_alloc(second, tables, 32)
    loop.connector.request_finished_all_groups(second, tables)
    loop.run()
    loop.close()


def test_only_blocks_behind_the_device_hit_are_loaded():
    loop = Loop()
    loop.serve("first", PROMPT)
    second = LoopRequest("second", PROMPT)
    assert loop.connector.get_num_new_matched_tokens(second, 16) == (16, True)
    tables = [list(range(8)), [None, None, 10, 11, 12, 13, 14, 15], [None, 3, None, 5]]
    loop.connector.update_state_after_alloc(second, tables, 16)
    (job,) = loop.connector.build_connector_meta(SchedulerOutput()).loads
    loaded = {blocks.group: blocks.block_ids.tolist() for blocks in job.blocks}
    assert loaded == {0: [4, 5, 6, 7], 1: [13, 14, 15], 2: [5]}
    assert all(blocks.block_ids.dtype == np.int32 for blocks in job.blocks)
    loop.connector.shutdown()
    assert not loop.pool.live, "a job that never reached the worker must not keep its slots"


def test_events_tell_groups_and_hashes_apart():
    loop = Loop(enable_events=True)
    first = loop.serve("first", PROMPT[:9])
    loop.connector.reset_cache()
    *stored, cleared = loop.connector.take_events()
    assert [event.group_idx for event in stored] == [0, 1, 2]
    assert stored[0].block_hashes == tuple(first.block_hashes[:2])
    assert (stored[2].block_size, stored[2].block_hashes) == (8, (first.block_hashes[1],))
    assert cleared == AllBlocksCleared()
    assert not loop.connector.take_events()
    loop.close()


def test_stats_count_bytes_chunks_and_reasons_per_group():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.serve("second", PROMPT)
    stats = loop.connector.get_stats()
    assert [group.stored_chunks for group in stats.groups] == [10, 10, 3]
    assert [group.stored_bytes for group in stats.groups] == [10 * 64, 10 * 32, 3 * 16]
    assert [group.loaded_chunks for group in stats.groups] == [8, 3, 1]
    assert (stats.hit_tokens, stats.loaded_bytes) == (32, 8 * 64 + 3 * 32 + 16)
    assert loop.connector.get_loaded_kv_cache_group_ids(LoopRequest("none", PROMPT)) == ()
    assert loop.connector.get_external_cache_hit_sources(LoopRequest("none", PROMPT), 8) == {"host": 8}
    loop.close()


def test_state_handed_over_as_its_request_is_preempted_and_admitted_again_is_that_of_the_first_stay():
    connector = make_connector()
    caches = make_caches(hybrid_config())
    connector.register_kv_caches(caches)
    request = LoopRequest("r", PROMPT)
    tables = [list(range(10)), list(range(10)), [None, 0]]

    def admit():
        assert connector.get_num_new_matched_tokens(request, 0)[0] == 0
        connector.update_state_after_alloc(request, tables, 0)

    connector.on_new_request(request)
    admit()
    connector.build_connector_meta(SchedulerOutput(num_scheduled_tokens={"r": 12}))
    request.num_computed_tokens = 12
    connector.update_connector_output(KVConnectorOutput())
    request.num_computed_tokens = 0
    admit()
    handed = {"r": [(2, 7, 8)]}
    metadata = connector.build_connector_meta(
        SchedulerOutput(preempted_req_ids={"r"}, boundary_state_offloads=handed)
    )
    (job,) = metadata.stores
    assert {blocks.group: blocks.block_ids.tolist() for blocks in job.blocks}[2] == [7]
    connector.handle_preemptions(caches, metadata)
    connector.update_connector_output(connector.get_transfer_results(set()))
    connector.request_finished_all_groups(request, tables)
    connector.build_connector_meta(SchedulerOutput())
    assert_no_leaks(connector)
    connector.shutdown()


def test_metadata_that_is_sent_twice_is_submitted_once():
    loop = Loop(max_step_tokens=64)
    loop.add("first", PROMPT)
    loop.step()
    loop.worker.delayed = True
    metadata = loop.connector.build_connector_meta(SchedulerOutput())
    for _ in range(2):
        loop.caches = loop.connector.handle_preemptions(loop.caches, metadata)
    assert len(loop.worker.job_ids) == len(metadata.stores) == 1
    loop.worker.finish()
    loop.caches = loop.connector.handle_preemptions(loop.caches, metadata)
    assert not loop.worker.job_ids, "nor when its jobs have ended"
    loop.worker.delayed = False
    loop.run()
    loop.connector.shutdown()


def test_loads_before_the_stores_of_the_step_are_refused():
    loop = Loop(max_step_tokens=64)
    loop.add("first", PROMPT)
    loop.step()
    metadata = loop.connector.build_connector_meta(SchedulerOutput())
    loop.connector.bind_connector_metadata(metadata)
    with pytest.raises(ConnectorStateError, match="handle_preemptions"):
        loop.connector.start_load_kv(loop.caches)
    loop.connector.handle_preemptions(loop.caches, metadata)
    loop.connector.start_load_kv(loop.caches)
    loop.connector.shutdown()


def test_load_that_ends_while_results_are_taken_is_reported_in_one_piece():
    loop = Loop()
    loop.serve("first", PROMPT)
    loop.worker.delayed = True
    loop.add("second", PROMPT)
    loop.step()
    real = loop.worker.get_finished

    def ends_after_the_first_look():
        taken = real()
        loop.worker.finish()
        return taken

    loop.worker.get_finished = ends_after_the_first_look
    output = loop.connector.get_transfer_results(set())
    assert (output.finished_recving, output.worker_meta) == (set(), None)
    output = loop.connector.get_transfer_results(set())
    assert output.finished_recving == {"second"}
    assert len(output.worker_meta.results) == 1
    loop.connector.shutdown()


def test_job_whose_submission_broke_off_is_submitted_when_its_metadata_comes_again():
    loop = Loop(max_step_tokens=64)
    loop.add("first", PROMPT)
    loop.step()
    metadata = loop.connector.build_connector_meta(SchedulerOutput())
    real, loop.worker.submit_store = loop.worker.submit_store, None
    with pytest.raises(TypeError):
        loop.connector.handle_preemptions(loop.caches, metadata)
    loop.worker.submit_store = real
    loop.connector.handle_preemptions(loop.caches, metadata)
    loop.run()
    assert loop.connector.get_stats().groups[0].stored_chunks == 10
    loop.connector.shutdown()
