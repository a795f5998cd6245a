"""The connector against the reference model: sequences of events that hypothesis finds, and random runs."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from cache_machine import Machine
from cache_model import CacheModel, Contents, Layer
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

    @precondition(lambda self: self.machine.worker.flights)
    @rule(odds=st.sampled_from([0.3, 1.0]))
    def land(self, odds):
        self.machine.land(odds)

    @rule(odds=st.sampled_from([0.0, 0.1, 1.0]))
    def change_speed_of_transfers(self, odds):
        self.machine.land_odds = odds

    @rule(odds=st.sampled_from([0.0, 0.3, 1.0]))
    def change_luck_of_transfers(self, odds):
        self.machine.fail_odds = odds

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
            self.machine.fail_odds = 0.0
            self.machine.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(20))
def test_random_runs_read_what_the_model_says_and_leave_nothing(seed):
    run_seed(seed, Counter())


# -- the model itself, by hand ----------------------------------------------------------------------------

WINDOW = Layer("window", 2, 4, size=6, sinks=1)


def make_model(*layers, alignment=4, tokens=24):
    model = CacheModel(layers, alignment)
    return model, model.extend(np.zeros(0, np.int64), tokens)


def store(model, ids, layer, *ends):
    model.stored([(layer, int(ids[end - 1])) for end in ends])


def test_sequences_share_values_exactly_as_far_as_they_share_tokens():
    model, ids = make_model(Layer("full", 2, 4))
    other = model.extend(ids[:7], 5)
    first, second = (Contents(model.layers, sequence).tokens[0] for sequence in (ids, other))
    assert np.array_equal(first[:7], second[:7])
    assert not np.isin(second[7:], first).any()


def test_full_attention_is_served_up_to_the_first_chunk_that_is_missing():
    model, ids = make_model(Layer("full", 2, 4))
    store(model, ids, 0, 4, 8, 16)
    assert model.longest_hit(ids, 0, 23) == 8
    assert model.longest_hit(ids, 0, 7) == 4
    assert model.longest_hit(ids, 12, 23) == 16
    model.dropped([(0, int(ids[3]))])
    assert model.longest_hit(ids, 0, 23) == 0
    assert model.longest_hit(ids, 0, 23, ever=True) == 8


def test_window_needs_its_last_tokens_and_its_sinks():
    model, ids = make_model(WINDOW)
    store(model, ids, 0, 12, 16)
    assert model.longest_hit(ids, 0, 23) == 0, "the sinks are missing"
    store(model, ids, 0, 4)
    assert model.longest_hit(ids, 0, 23) == 16, "the token at 16 reads those from 11 on"
    assert model.longest_hit(ids, 0, 15) == 4, "the token at 12 reads chunk [4, 8) too"


def test_state_needs_the_last_chunk_alone_and_all_layers_must_agree():
    model, ids = make_model(Layer("state", 4, 4), Layer("full", 2, 4))
    store(model, ids, 0, 8, 16)
    store(model, ids, 1, 4, 8, 12)
    assert model.longest_hit(ids, 0, 23) == 8
    model.forget_all()
    assert model.longest_hit(ids, 0, 23, ever=True) == 0


def test_chunked_local_attention_needs_nothing_at_the_start_of_a_chunk():
    model, ids = make_model(Layer("local", 2, 4, size=8))
    store(model, ids, 0, 20)
    assert model.longest_hit(ids, 0, 23) == 20
    assert model.longest_hit(ids, 0, 19) == 16, "nothing is read there"
    assert model.longest_hit(ids, 0, 15) == 8
