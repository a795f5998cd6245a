"""The crowd that measurements run on, and the benchmarks of the command line at toy sizes."""

from __future__ import annotations

import json

import pytest

from jaxkv.cli.bench.series import Measurement
from jaxkv.cli.main import main
from jaxkv.replay.crowd import BLOCK, Crowd, FullPool
from jaxkv.testing.leaks import assert_no_leaks

CHUNKS, CONTEXT = 3000, 2048


@pytest.fixture
def crowd():
    pool = FullPool(CHUNKS, CONTEXT)
    yield Crowd(pool)
    assert_no_leaks(pool.connector)
    pool.connector.shutdown()


def stored(crowd: Crowd) -> int:
    return sum(group.stored_chunks for group in crowd.pool.connector.get_stats().groups)


def test_a_sixteenth_of_the_crowd_stores_a_chunk_in_each_group_at_every_step(crowd):
    crowd.enter(32, CONTEXT)
    crowd.align(1)
    crowd.spread()
    crowd.decode()
    before, evicted = stored(crowd), crowd.pool.connector.get_stats().evicted_chunks
    for _ in range(20):
        assert crowd.decode() > 0
    assert stored(crowd) - before == 20 * 2 * 3
    assert crowd.pool.connector.get_stats().evicted_chunks > evicted, "the pool was not full"
    crowd.leave()


def test_quiet_steps_store_nothing(crowd):
    crowd.enter(32, CONTEXT)
    crowd.align(1)
    before = stored(crowd)
    for _ in range(BLOCK - 2):
        crowd.decode()
    assert stored(crowd) == before
    crowd.settle()
    assert {request.num_computed_tokens % BLOCK for request in crowd.running} == {BLOCK - 1}
    crowd.leave()


def test_admissions_find_every_context_before_and_after_others_ran(crowd):
    crowd.enter(16, CONTEXT)
    for context in range(2 * len(crowd.pool.contexts)):
        times = crowd.admit_from_host(context, CONTEXT)
        assert min(times.lookup_s, times.allocation_s, times.load_step_s, times.first_steps_s) > 0
        assert crowd.admit_on_device(context, CONTEXT // 2) > 0
        crowd.decode()
    loaded = crowd.pool.connector.get_stats().groups[0].loaded_chunks
    assert loaded == 2 * len(crowd.pool.contexts) * CONTEXT // BLOCK
    crowd.leave()


def test_a_measurement_has_a_median_a_spread_and_a_verdict():
    measurement = Measurement("it", tuple(float(i) for i in range(101)), target_s=50.0)
    assert (measurement.median_s, measurement.spread_s, measurement.met) == (50.0, (10.0, 90.0), True)
    assert not Measurement("it", (2.0,), target_s=1.0).met
    assert Measurement("it", (2.0,)).met


TOY = [
    "bench", "scheduler", "--chunks", "3000", "--fewer-chunks", "1500", "--context-tokens", "2048",
    "--shorter-context-tokens", "512", "--running", "16", "--repeats", "4", "--index-chunks", "600",
]  # fmt: skip


def test_scheduler_benchmark_prints_figures_with_targets_and_machine(capsys):
    assert main(TOY) == 0
    text = capsys.readouterr().out
    assert "16 running requests of 2,048 tokens, 3 groups, 3,000 resident chunks" in text
    for part in (
        "1 of 16 finish a block",
        "get_num_new_matched_tokens",
        "lookup_prefix",
        "hashes of a prompt",
        "600 chunks",
        "cpu",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_scheduler_benchmark_gives_json_and_judges_when_asked(capsys):
    status = main([*TOY, "--json", "--check"])
    document = json.loads(capsys.readouterr().out)
    sizes = [(crowd["chunks"], crowd["context_tokens"]) for crowd in document["crowds"]]
    assert sizes == [(3000, 2048), (3000, 512), (1500, 2048), (1500, 512)]
    judged = [*document["crowds"][0]["measurements"], *document["lookups"]]
    missed = [one for one in judged if one["target_s"] is not None and one["median_s"] > one["target_s"]]
    assert status == (1 if missed else 0)


def test_retention_benchmark_counts_prompts(capsys):
    """The pool holds 341 blocks of all layers: a family of 192, and of the one before all but a branch."""
    argv = ["--families", "2", "--branches", "2", "--prompt-tokens", "2048", "--shared-tokens", "1024"]
    assert main(["bench", "retention", *argv, "--host-bytes", "2GiB", "--retention", "dense"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense", "2.25", "3/4", "2", "2", "1.0"] in rows
