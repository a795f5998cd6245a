"""Recurrent states that no table shows: handed over by the loop, in a step or when a request ends."""

import pytest
from connector_loop import Loop, expected_output, value_of
from loop_model import make_config
from loop_tools import held, holds

from jaxkv.connector import SchedulerOutput
from jaxkv.errors import RequestError

PROMPT = list(range(100, 150))
STATE = 2


class EmittingLoop(Loop):
    """Its model leaves copies of its states in blocks of their own, at ``emit_at`` tokens of each request."""

    def __init__(self, emit_at=(), **options):
        super().__init__(**options)
        self.emit_at = emit_at
        self.spare: list[int] = []

    def forward(self, request, count):
        start = request.num_computed_tokens
        super().forward(request, count)
        for end in self.emit_at:
            if start < end <= start + count:
                block = self.keep_state(request, end)
                self.handed.setdefault(request.request_id, []).append((STATE, block, end))

    def keep_state(self, request, end):
        """A block that holds the state at ``end`` tokens until the next step is planned."""
        block = self.free[STATE].pop()
        self.spare.append(block)
        self.caches["state.0"][block] = [value_of(tuple(request.tokens[:end])), end]
        return block

    def schedule(self):
        """Whoever comes next may write the blocks of handed states."""
        self.free[STATE] += self.spare
        self.spare = []
        return super().schedule()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_states_a_model_emits_on_its_way_through_a_long_step_can_be_hit(blocks_per_chunk):
    loop = EmittingLoop(emit_at=(16, 32), max_step_tokens=64, blocks_per_chunk=blocks_per_chunk)
    first = loop.serve("first", PROMPT)
    assert held(loop, first, STATE) == {16, 32, 48}
    for length, hit in ((20, 16), (40, 32), (50, 48)):
        name = f"{length} tokens"
        assert loop.serve(name, PROMPT[:length], 3).host_hits == [hit]
        assert loop.outputs[name] == expected_output(PROMPT[:length], 3)
    loop.close()


def test_states_of_neighbouring_chunks_can_be_handed_over_together():
    loop = EmittingLoop(emit_at=(8, 16, 24, 40), max_step_tokens=64)
    first = loop.serve("first", PROMPT)
    assert held(loop, first, STATE) == {8, 16, 24, 40, 48}
    for length, hit in ((10, 8), (20, 16), (30, 24), (42, 40)):
        name = f"{length} tokens"
        assert loop.serve(name, PROMPT[:length], 3).host_hits == [hit]
        assert loop.outputs[name] == expected_output(PROMPT[:length], 3)
    loop.close()


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_a_handed_state_between_the_links_of_a_chunk_asks_for_a_tail(blocks_per_chunk):
    """One step of 46 tokens, links of 4: its state at 44 was copied before the step wrote on."""
    loop = EmittingLoop(emit_at=(44,), max_step_tokens=64, blocks_per_chunk=blocks_per_chunk)
    first = loop.serve("first", PROMPT[:46])
    assert holds(loop, first, STATE, 44)
    assert loop.serve("second", PROMPT[:46], 3).host_hits == [44]
    assert loop.outputs["second"] == expected_output(PROMPT[:46], 3)
    loop.close()


def test_a_handed_state_inside_a_chunk_keeps_what_of_the_window_only_a_hit_there_reads():
    loop = EmittingLoop(emit_at=(20,), max_step_tokens=64, retention_interval=0)
    loop.serve("first", PROMPT)
    branch = [*PROMPT[:20], 1, 2, 3]
    assert loop.serve("second", branch, 3).host_hits == [20]
    assert loop.outputs["second"] == expected_output(branch, 3)
    loop.close()


def test_blocks_of_handed_states_are_read_before_anybody_writes_them():
    """They are free in the step that stores them, and given to the next request at once."""
    loop = EmittingLoop(emit_at=(16,), max_step_tokens=64)
    first = loop.add("first", PROMPT, 5)
    loop.step()
    (_, block, _) = loop.handed["first"][0]
    other = loop.add("other", [7, *PROMPT[:40]])
    loop.step()
    assert any(block in request.tables[STATE] for request in (first, other))
    loop.run()
    assert loop.serve("second", PROMPT[:20], 3).host_hits == [16]
    assert loop.outputs["second"] == expected_output(PROMPT[:20], 3)
    loop.close()


def finish_with_tail(loop, name, prompt, boundary, num_new):
    """Serve a request whose state at ``boundary`` is kept and offered when it ends."""
    request = loop.add(name, prompt, num_new)
    finish, kept = loop.connector.request_finished_all_groups, {}
    compute = loop.compute_tokens

    def keep(owner, start, end):
        compute(owner, start, end)
        if owner is request and start < boundary <= end:
            kept["block"] = loop.free[STATE].pop()
            loop.caches["state.0"][kept["block"]] = [value_of(tuple(owner.tokens[:boundary])), boundary]

    def register_and_finish(owner, tables):
        if owner is request:
            offloads = [(STATE, kept["block"], boundary)]
            assert loop.connector.register_finished_partial_tail(owner, tables, offloads) is False
            loop.free[STATE].append(kept["block"])
        return finish(owner, tables)

    loop.compute_tokens = keep
    loop.connector.request_finished_all_groups = register_and_finish
    loop.run()
    del loop.connector.request_finished_all_groups
    loop.compute_tokens = compute
    return prompt + loop.outputs[name]


@pytest.mark.parametrize("finishes_first", [False, True])
def test_the_tail_of_a_finished_request_is_where_its_next_turn_begins(finishes_first):
    loop = Loop(offload_prompt_only=False, max_step_tokens=64)
    loop.finishes_first = finishes_first
    tokens = finish_with_tail(loop, "first", PROMPT[:30], 36, 8)
    turn = [*tokens, 1, 2, 3]
    assert loop.serve("second", turn, 3).host_hits == [36]
    assert loop.outputs["second"] == expected_output(turn, 3)
    loop.close()


@pytest.mark.parametrize("num_further", [3, 30])
def test_the_tail_of_a_finished_request_counts_also_where_no_state_before_it_was_kept(num_further):
    """Nothing but the end of the first turn was kept of states, and of the window what its end reads."""
    loop = Loop(offload_prompt_only=False, retention_interval=0, max_step_tokens=64)
    tokens = finish_with_tail(loop, "first", PROMPT[:7], 44, 38)
    turn = [*tokens, *PROMPT[:num_further]]
    assert loop.serve("second", turn, 3).host_hits == [44]
    assert loop.outputs["second"] == expected_output(turn, 3)
    loop.close()


@pytest.mark.parametrize("num_new", [4, 8, 12])
@pytest.mark.parametrize("retention_interval", [None, 0])
def test_a_state_at_a_chunk_that_was_passed_over_is_stored_when_it_is_handed_over_at_the_end(
    num_new, retention_interval
):
    """It is at 32 tokens; the request ends 1, 5 or 9 tokens later, in the last case with another chunk."""
    loop = Loop(offload_prompt_only=False, retention_interval=retention_interval, max_step_tokens=64)
    offered, manager = [], loop.spec.get_manager()
    real = manager.prepare_stores
    manager.prepare_stores = lambda offers: offered.append([list(keys) for keys, _ in offers]) or real(offers)
    tokens = finish_with_tail(loop, "first", PROMPT[:30], 32, num_new)
    assert all(len(set(keys)) == len(keys) for offers in offered for keys in offers), "nothing twice"
    turn = [*tokens[:33], 1, 2, 3]
    hits = loop.serve("second", turn, 3).host_hits
    assert hits == ([32] if num_new < 12 or retention_interval is None else [24])
    assert loop.outputs["second"] == expected_output(turn, 3)
    loop.close()


def test_a_state_before_everything_that_is_new_is_stored_when_it_is_handed_over():
    """Nothing became complete since it was passed over: the state alone is stored."""
    loop = Loop(max_step_tokens=64)
    finish_with_tail(loop, "first", PROMPT[:30], 16, 4)
    assert loop.serve("second", PROMPT[:20], 3).host_hits == [16]
    assert loop.outputs["second"] == expected_output(PROMPT[:20], 3)
    loop.close()


def test_a_tail_of_generated_tokens_is_not_stored_where_only_prompts_are():
    loop = Loop(max_step_tokens=64)
    tokens = finish_with_tail(loop, "first", PROMPT[:30], 36, 8)
    assert loop.serve("second", [*tokens, 1, 2, 3]).host_hits == [24]
    loop.close()


def running_request(loop):
    first = loop.add("first", PROMPT[:30], 5)
    loop.step()
    loop.step()
    return first


@pytest.mark.parametrize(
    ("group", "boundary", "named"),
    [(2, 15, "15"), (2, 0, "0"), (2, -4, "-4"), (0, 16, "group 0"), (7, 16, "7")],
)
def test_a_state_at_no_link_or_of_a_group_without_states_is_named(group, boundary, named):
    loop = Loop()
    first = running_request(loop)
    with pytest.raises(RequestError, match=f"'first'.*{named}"):
        loop.connector.register_finished_partial_tail(first, first.tables, [(group, 3, boundary)])
    with pytest.raises(RequestError, match=f"'first'.*{named}"):
        loop.connector.build_connector_meta(
            SchedulerOutput(boundary_state_offloads={"first": [(group, 3, boundary)]})
        )
    loop.run()
    loop.close()


def test_states_of_requests_that_are_over_are_not_asked_for():
    loop = Loop()
    first = loop.serve("first", PROMPT[:30])
    loop.handed = {"first": [(STATE, 3, 16)], "nobody": [(STATE, 3, 16)]}
    loop.step()
    assert loop.connector.register_finished_partial_tail(first, [], [(STATE, 3, 16)]) is False
    assert not loop.connector.has_pending_push_work()
    loop.close()


def test_a_model_of_states_alone_is_hit_at_a_handed_state():
    loop = Loop(config=make_config({"state": 1}), max_step_tokens=64)
    emitting = {"first": [(0, 9, 16)]}
    first = loop.add("first", PROMPT)
    loop.step()
    loop.free[0].remove(9)
    loop.caches["state.0"][9] = [value_of(tuple(PROMPT[:16])), 16]
    loop.handed = emitting
    loop.step()
    loop.free[0].append(9)
    loop.run()
    assert 16 in held(loop, first, 0)
    assert loop.serve("second", PROMPT[:20], 3).host_hits == [16]
    assert loop.outputs["second"] == expected_output(PROMPT[:20], 3)
    loop.close()
