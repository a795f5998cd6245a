"""The connector over caches on a mesh: hits from the host, data shards, and what is logged."""

from __future__ import annotations

import numpy as np
import pytest
from connector_loop import LoopRequest
from mesh_caches import DATA_2_TENSOR_2, MESH_CASES, TENSOR_4, put_on_mesh, random_host, to_host
from mesh_toy_model import MeshToyModel, head_shares
from toy_model import make_config, oracle_tokens, random_prompt, share_programs

from jaxkv.connector import OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.testing import assert_same_caches
from jaxkv.testing.leaks import assert_no_leaks

KINDS = ("full", "window", "state")
TIGHT = {"full": 30, "window": 14, "state": 4}


def test_shares_of_the_heads_add_up_to_one():
    shares = head_shares()
    assert np.sum(shares, dtype=np.uint32) == 1
    assert len(set(shares.tolist())) == len(shares)


@pytest.mark.parametrize("portable_pages", [False, True], ids=["per_shard", "portable"])
def test_evicted_prompts_come_back_from_the_host_to_all_devices(portable_pages, caplog):
    model = MeshToyModel(kinds=KINDS)
    config = make_config(model, 4, **TIGHT)
    options = OffloadingConfig("1MiB", portable_pages=portable_pages)
    connector = OffloadingConnector(options, config, hints=model.hints())
    engine_config = EngineConfig(prefill_shapes=(8, 32), max_num_seqs=3)
    engine = share_programs(LLMEngine(model, config, engine_config, connector))
    prompts = [random_prompt(seed, 70 + seed) for seed in range(4)]
    params = SamplingParams(max_new_tokens=5)
    expected = [oracle_tokens(prompt, 5, KINDS) for prompt in prompts]
    assert [output.output_ids for output in engine.generate(prompts, params)] == expected
    engine.reset_prefix_cache()
    for prompt, tokens in zip(prompts, expected, strict=True):
        (output,) = engine.generate([prompt], params)
        assert output.output_ids == tokens
        assert output.metrics.host_hit_tokens > 0
    engine.flush()
    assert connector.get_stats().loaded_bytes > 0
    assert_no_leaks(connector)
    assert "not portable" not in caplog.text
    engine.shutdown()


def test_layers_whose_pages_are_not_portable_are_logged_with_the_reason(caplog):
    case = MESH_CASES["gated_delta_net"]
    options = OffloadingConfig("1MiB", portable_pages=True)
    with OffloadingConnector(options, case.config, hints=case.hints) as connector:
        connector.register_kv_caches(put_on_mesh(case, TENSOR_4, random_host(case, 1)))
    for layer in case.config.groups[0].layer_names:
        assert f"pages of layer {layer!r} are not portable: layer {layer!r}, leaf 0" in caplog.text
    assert "not known to list heads in order" in caplog.text


# -- data shards ----------------------------------------------------------------------------------------

TOKENS = list(range(13))


def run_step(connector, caches, output):
    """The worker's part of one step, without a model."""
    metadata = connector.build_connector_meta(output)
    caches = connector.handle_preemptions(caches, metadata)
    connector.bind_connector_metadata(metadata)
    caches = connector.wait_for_save(connector.start_load_kv(caches))
    result = connector.get_transfer_results(output.finished_req_ids)
    connector.clear_connector_metadata()
    connector.update_connector_output(result)
    return caches, result


def run_until_idle(connector, caches, finished=frozenset()):
    caches, result = run_step(connector, caches, SchedulerOutput(finished_req_ids=set(finished)))
    received = set(result.finished_recving)
    while connector.has_pending_push_work():
        caches, result = run_step(connector, caches, SchedulerOutput())
        received |= result.finished_recving
    return caches, received


def store_prompt(connector, caches, blocks):
    """A request that computed ``TOKENS`` into ``blocks``, and is over."""
    request = LoopRequest("first", TOKENS)
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    connector.update_state_after_alloc(request, [blocks], 0)
    output = SchedulerOutput({"first": len(TOKENS)}, {"first": [blocks]})
    caches, _ = run_step(connector, caches, output)
    request.num_computed_tokens = len(TOKENS)
    connector.request_finished_all_groups(request, [blocks])
    return run_until_idle(connector, caches, {"first"})[0]


def load_prompt(connector, caches, blocks):
    """Another request with the same tokens, whose hit lands in ``blocks``."""
    request = LoopRequest("second", TOKENS)
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (12, True)
    connector.update_state_after_alloc(request, [blocks], 12)
    caches, received = run_until_idle(connector, caches)
    assert received == {"second"}
    connector.request_finished_all_groups(request, [blocks])
    return run_until_idle(connector, caches, {"second"})[0]


def test_connectors_of_two_data_shards_take_turns_on_one_pytree():
    case = MESH_CASES["kv_axis_first"].with_data_shards(2)
    host = random_host(case, 1)
    caches = put_on_mesh(case, DATA_2_TENSOR_2, host)
    connectors = [
        OffloadingConnector(
            OffloadingConfig("1MiB", data_shard=shard),
            case.config,
            hints=case.hints,
        )
        for shard in (0, 1)
    ]
    for connector in connectors:
        connector.register_kv_caches(caches)
    stored = [[0, 3, 2, 5], [4, 1, 0, 2]]
    for connector, blocks in zip(connectors, stored, strict=True):
        caches = store_prompt(connector, caches, blocks)
    for connector in connectors[::-1]:
        caches = load_prompt(connector, caches, [1, 2, 3])
    for shard, blocks in enumerate(stored):
        view = case.data_shard(host, shard, 2)
        pages = [case.oracle(view, 0, block) for block in blocks[:3]]
        for place, page in zip([1, 2, 3], pages, strict=True):
            case.poke(view, 0, place, page)
    assert_same_caches(to_host(caches), host)
    for connector in connectors:
        assert connector.get_stats().loaded_bytes > 0
        assert_no_leaks(connector)
        connector.shutdown()


def test_a_restored_hit_is_the_same_logits_bit_for_bit():
    """The state of the caches after a hit from the host equals that of the run that computed it."""
    model = MeshToyModel(kinds=KINDS)
    config = make_config(model, 4, **TIGHT)
    connector = OffloadingConnector(OffloadingConfig("1MiB"), config, hints=model.hints())
    engine = share_programs(LLMEngine(model, config, EngineConfig(prefill_shapes=(8, 32)), connector))
    prompt = random_prompt(5, 61)
    params = SamplingParams(max_new_tokens=3, return_logits=True)
    (computed,) = engine.generate([prompt], params)
    engine.reset_prefix_cache()
    (loaded,) = engine.generate([prompt], params)
    assert loaded.metrics.host_hit_tokens == 60
    for one, other in zip(computed.logits, loaded.logits, strict=True):
        assert one.tobytes() == other.tobytes()
    engine.shutdown()
