"""The connector against the reference model: sequences of events that hypothesis finds, and random runs."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from cache_machine import Machine
from cache_setup import draw_setup
from fuzz_cache import MAX_WAITING, run_seed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


class CacheMachine(RuleBasedStateMachine):
    """Any order of events; what a step reads is checked in the step, all else after every event."""

    machine: Machine | None = None

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        draw = Random(seed)
        self.machine = Machine(draw_setup(draw), draw, Counter())

    @precondition(lambda self: len(self.machine.loop.waiting) < MAX_WAITING)
    @rule()
    def arrive(self):
        self.machine.arrive()

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.machine.step()

    @precondition(lambda self: self.machine.loop.requests)
    @rule()
    def abort(self):
        self.machine.abort()

    @precondition(lambda self: self.machine.loop.running)
    @rule()
    def preempt(self):
        self.machine.preempt()

    @precondition(lambda self: self.machine.loop.running)
    @rule()
    def copy_block(self):
        self.machine.copy_block()

    @precondition(lambda self: self.machine.in_flight)
    @rule(odds=st.sampled_from([0.3, 1.0]))
    def land(self, odds):
        self.machine.land(odds)

    @rule(odds=st.sampled_from([0.0, 0.1, 1.0]))
    def change_speed_of_transfers(self, odds):
        self.machine.land_odds = odds

    @rule(odds=st.sampled_from([0.0, 0.3, 1.0]))
    def change_luck_of_transfers(self, odds):
        self.machine.fail_odds = odds

    @rule(odds=st.sampled_from([0.0, 0.3, 1.0]))
    def change_how_often_stores_are_refused(self, odds):
        self.machine.manager.refuse = odds

    @rule()
    def break_off_a_step(self):
        self.machine.step(breaks_off=True)

    @precondition(lambda self: self.machine.setup.resets)
    @rule()
    def reset_device(self):
        self.machine.reset_device()

    @precondition(lambda self: self.machine.setup.resets)
    @rule()
    def reset_host(self):
        self.machine.reset_host()

    @invariant()
    def references_are_those_of_the_tables(self):
        if self.machine is not None:
            self.machine.check()

    def teardown(self):
        if self.machine is not None:
            self.machine.land_odds = 1.0
            self.machine.fail_odds = self.machine.manager.refuse = self.machine.manager.retry = 0.0
            self.machine.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(20))
def test_random_runs_read_what_the_model_says_and_leave_nothing(seed):
    run_seed(seed, Counter())
