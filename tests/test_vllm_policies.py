"""What vLLM itself answered to seeded calls (data/vllm_*_traces.json) must be answered here as well."""

import json
from collections import Counter
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import pytest
from eviction_rules import RuleManager
from policy_player import Player
from policy_traffic import ANSWERED, Setup, Traffic

from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.testing.fake_pool import FakePool

SLOT_BYTES = 512
VLLM = {
    policy: json.loads(Path(__file__).with_name("data").joinpath(f"vllm_{policy}_traces.json").read_text())
    for policy in ("lru", "arc")
}
CASES = [
    pytest.param(policy, trace, id=f"{policy}-{trace['seed']}")
    for policy, data in VLLM.items()
    for trace in data["traces"]
]


def setup_of(trace):
    return Setup(**{field.name: trace[field.name] for field in fields(Setup)})


def make_rules(policy, setup):
    return RuleManager(policy, setup.capacity, setup.threshold, setup.tracker)


def make_host(policy, setup):
    pool = FakePool(setup.capacity * SLOT_BYTES, SLOT_BYTES)
    return HostOffloadingManager(
        pool,
        [SLOT_BYTES] * len(setup.steps),
        policy,
        store_threshold=setup.threshold,
        max_tracked_keys=setup.tracker,
    )


@pytest.mark.parametrize(("policy", "trace"), CASES)
@pytest.mark.parametrize("make_manager", [make_rules, make_host])
def test_every_answer_is_vllms(make_manager, policy, trace):
    setup = setup_of(trace)
    player = Player(make_manager(policy, setup), setup)
    for number, recorded in enumerate(trace["ops"]):
        call, answers = (recorded[:-1], recorded[-1:]) if recorded[0] in ANSWERED else (recorded, [None])
        assert [player.play(call)] == answers, f"call {number} of the trace, {call}"
    assert not player.manager.leaks()


@pytest.mark.parametrize(("policy", "trace"), CASES)
def test_stores_of_a_step_together_are_answered_as_one_after_another(policy, trace):
    setup = setup_of(trace)
    player = Player(make_host(policy, setup), setup)
    for is_store, group in groupby(trace["ops"], key=lambda call: call[0] == "store"):
        if not is_store:
            for call in group:
                player.play(call[:-1] if call[0] in ANSWERED else call)
            continue
        offers, answers = zip(*[(call[1:-1], call[-1]) for call in group], strict=True)
        skipped, evicted = player.store_together(offers)
        assert skipped == [answer and answer[0] for answer in answers]
        assert evicted == [key for answer in answers if answer for key in answer[1]]
    assert not player.manager.leaks()


@pytest.mark.parametrize("seed", range(5_000, 5_040))
@pytest.mark.parametrize("policy", VLLM)
def test_where_nothing_is_recorded_every_answer_is_that_of_the_rules(policy, seed):
    setup = Setup.of_seed(seed)
    rules, host = (Player(make(policy, setup), setup) for make in (make_rules, make_host))

    def play(call):
        answer = rules.play(call)
        assert host.play(call) == answer, call
        return answer

    Traffic(setup, play).run()
    assert not host.manager.leaks()


@pytest.mark.parametrize("policy", VLLM)
def test_traces_hold_what_they_are_to_tell_apart(policy):
    seen = Counter()
    for trace in VLLM[policy]["traces"]:
        seen[f"threshold {trace['threshold']}"] += 1
        seen[f"positions in {len(trace['positions'])} of {len(trace['steps'])} groups"] += 1
        for name, *arguments in trace["ops"]:
            seen[name] += 1
            seen["failed store"] += name == "stored" and not arguments[1]
            seen["refused store"] += name == "store" and arguments[3] is None
            seen["store that evicts"] += name == "store" and bool(arguments[3] and arguments[3][1])
            seen["reset with jobs under way"] += name == "reset" and bool(arguments[0])
            seen["pending answer"] += name == "look" and "P" in arguments[2]
    wanted = {
        "store that evicts": 400,
        "refused store": 100,
        "failed store": 80,
        "loaded": 300,
        "touch": 100,
        "pending answer": 200,
        "reset with jobs under way": 5,
        "threshold 0": 12,
        "threshold 2": 6,
        "threshold 3": 6,
        "positions in 0 of 2 groups": 1,
        "positions in 1 of 2 groups": 2,
        "positions in 2 of 2 groups": 8,
        "positions in 1 of 1 groups": 8,
    }
    assert {what: seen[what] for what, number in wanted.items() if seen[what] < number} == {}
