"""What a step may read and write of its paged caches, for every model; attention and SSD against NumPy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkv_models import attention, load_model, ssd
from models_driver import (
    BLOCK_SIZE,
    DATA,
    TINY_GEMMA3,
    Runner,
    is_state,
    jitted_step,
    tiny_gemma3_tensors,
    write_directory,
)

from jaxkv.serving.model import Model, StepBatch

ROUNDING = 1e-9
"""Bound of float64 logits: differently shaped matrix products round differently, by 1e-12 here.

In float32 the recurrence amplifies that to 1e-3, more than some mistakes would.
"""
PROMPT = [int(token) for token in np.random.default_rng(5).integers(2, 250, 150)]


@pytest.fixture(scope="module", params=["tiny_gemma3", "tiny_recurrent_gemma", "tiny_bamba"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param == "tiny_gemma3":
        path = tmp_path_factory.mktemp("tiny_gemma3")
        return load_model(write_directory(path, TINY_GEMMA3, tiny_gemma3_tensors()))
    return load_model(DATA / request.param)


@pytest.fixture
def float64_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The model with everything it computes and stores in float64."""
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params)
        yield dataclasses.replace(model, params=params)


def leaves(caches: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(caches)]


def assert_same_bytes(actual: Any, expected: Any) -> None:
    for left, right in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def test_prompt_cut_into_chunks_gives_the_logits_of_the_whole_prompt(float64_model: Model) -> None:
    whole, cut = Runner(float64_model), Runner(float64_model)
    expected = whole.prefill(whole.requests[0], PROMPT, shapes=(256,))
    actual = cut.prefill(cut.requests[0], PROMPT, shapes=(32,))
    np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=0)


def test_decoding_a_token_gives_the_logits_of_prefilling_it(float64_model: Model) -> None:
    prefilled, decoded = Runner(float64_model), Runner(float64_model)
    expected = prefilled.prefill(prefilled.requests[0], PROMPT)
    decoded.prefill(decoded.requests[0], PROMPT[:-1])
    actual = decoded.step([(decoded.requests[0], PROMPT[-1:])], 1)[0]
    np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=0)


def test_padding_after_the_last_token_changes_neither_logits_nor_caches(float64_model: Model) -> None:
    exact, padded = Runner(float64_model), Runner(float64_model)
    expected = exact.prefill(exact.requests[0], PROMPT[:20], shapes=(20,))
    actual = padded.prefill(padded.requests[0], PROMPT[:20], shapes=(32,))
    np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=0)
    for left, right in zip(leaves(padded.caches), leaves(exact.caches), strict=True):
        np.testing.assert_allclose(left, right, atol=ROUNDING, rtol=1e-4)
        np.testing.assert_array_equal(left == 0, right == 0)


def test_token_ids_of_the_padding_leave_no_trace(model: Model) -> None:
    runner, other = Runner(model), Runner(model)
    batch = runner.batch([(runner.requests[0], PROMPT[:20])], 32)
    repadded = np.where(np.arange(32) < 20, batch.token_ids, 99).astype(np.int32)
    again = StepBatch(repadded, batch.num_computed, batch.num_new, batch.block_tables)
    expected, caches = jitted_step(model)(model.params, runner.caches, batch)
    actual, other_caches = jitted_step(model)(model.params, other.caches, again)
    np.testing.assert_array_equal(actual, expected)
    assert_same_bytes(other_caches, caches)


def test_row_without_new_tokens_leaves_the_caches_as_they_were(model: Model) -> None:
    runner = Runner(model)
    request = runner.requests[0]
    runner.prefill(request, PROMPT)
    before = leaves(runner.caches)
    logits = runner.step([(request, []), (None, [])], 1)
    assert np.isfinite(logits).all()
    assert_same_bytes(runner.caches, before)


def test_rows_of_one_batch_do_not_influence_each_other(float64_model: Model) -> None:
    alone, together = Runner(float64_model), Runner(float64_model)
    for runner in (alone, together):
        runner.prefill(runner.requests[0], PROMPT)
        runner.prefill(runner.requests[1], PROMPT[:30])
    expected = [alone.step([(request, [9])], 1)[0] for request in alone.requests]
    actual = together.step([(request, [9]) for request in together.requests] + [(None, [])], 1)
    np.testing.assert_allclose(actual[:2], expected, atol=ROUNDING, rtol=0)


def test_blocks_the_table_does_not_name_are_neither_read_nor_written(model: Model) -> None:
    clean, poisoned = Runner(model), Runner(model)
    poisoned.caches = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), poisoned.caches)
    expected = clean.prefill(clean.requests[1], PROMPT, shapes=(32,))
    actual = poisoned.prefill(poisoned.requests[1], PROMPT, shapes=(32,))
    np.testing.assert_array_equal(actual, expected)
    for group in poisoned.config.groups:
        request = poisoned.requests[1]
        used = -(-len(PROMPT) // BLOCK_SIZE)
        mine = list(request.state_blocks) if is_state(group.spec) else list(request.table[:used])
        for name in group.layer_names:
            for leaf in poisoned.caches[name]:
                others = np.delete(np.asarray(leaf), mine, axis=0)
                assert np.isnan(others).all(), f"{name} was written outside blocks {mine}"


def test_state_is_written_only_to_the_block_asked_for(model: Model) -> None:
    runner = Runner(model)
    request = runner.requests[0]
    runner.prefill(request, PROMPT[:32])
    kept = {
        name: [np.array(leaf[request.state_blocks[0]]) for leaf in runner.caches[name]]
        for group in runner.config.groups
        if is_state(group.spec)
        for name in group.layer_names
    }
    read_block = request.state_blocks[0]
    runner.step([(request, PROMPT[32:64])], 32)
    for name, parts in kept.items():
        for leaf, part in zip(runner.caches[name], parts, strict=True):
            np.testing.assert_array_equal(np.asarray(leaf[read_block]), part)


def test_window_layers_do_not_need_blocks_before_the_window(model: Model) -> None:
    full, holed = Runner(model), Runner(model)
    for runner in (full, holed):
        runner.prefill(runner.requests[0], PROMPT)
    batch = holed.batch([(holed.requests[0], [9])], 1)
    tables = []
    for spec, table in zip(holed.specs, batch.block_tables, strict=True):
        window = getattr(spec, "sliding_window", None)
        first_needed = 0 if window is None else (len(PROMPT) - window + 1) // BLOCK_SIZE
        holes = np.arange(table.shape[1])[None, :] < first_needed
        tables.append(np.where(holes & (not is_state(spec)), -1, table))
    holed_batch = StepBatch(batch.token_ids, batch.num_computed, batch.num_new, tuple(tables))
    expected = full.step([(full.requests[0], [9])], 1)
    actual, _ = jitted_step(model)(model.params, holed.caches, holed_batch)
    np.testing.assert_array_equal(np.asarray(actual), expected)


def test_logits_do_not_depend_on_which_blocks_hold_the_request(model: Model) -> None:
    here, there = Runner(model), Runner(model)
    expected = here.prefill(here.requests[0], PROMPT)
    actual = there.prefill(there.requests[1], PROMPT)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (1, 1), (2, 1)])
def test_step_updates_donated_caches_in_place_without_copying_a_leaf(
    model: Model, rows: int, width: int
) -> None:
    runner = Runner(model)
    batch = runner.batch([(request, PROMPT[:width]) for request in runner.requests[:rows]], width)
    compiled = jitted_step(model).lower(model.params, runner.caches, batch).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.caches))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    for leaf in jax.tree.leaves(runner.caches):
        shape = ",".join(str(size) for size in leaf.shape)
        copies = re.findall(rf".*= f32\[{shape}\]\S* copy\(.*", compiled.as_text())
        assert not copies
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(runner.caches)]
    _, after = compiled(model.params, runner.caches, batch)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_bfloat16_caches_stay_close_to_float32(model: Model) -> None:
    exact, rounded = Runner(model), Runner(model)
    rounded.caches = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim != 2 else leaf, rounded.caches
    )
    expected = exact.prefill(exact.requests[0], PROMPT)
    actual = rounded.prefill(rounded.requests[0], PROMPT)
    assert rounded.caches[next(iter(rounded.caches))][0].dtype == jnp.bfloat16
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


def dense_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, window: int | None
) -> np.ndarray:
    """Causal attention in float64: q (T, Hq, D) at positions from ``first`` on, k and v (N, H, D)."""
    shared = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
    scores = np.einsum("thd,nhd->htn", q, k, dtype=np.float64)
    distance = (first + np.arange(len(q)))[:, None] - np.arange(len(k))
    hidden = (distance < 0) | (distance >= (window or np.inf))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("htn,nhd->thd", weights, v).reshape(len(q), -1)


@pytest.mark.parametrize("window", [None, 33, 300])
@pytest.mark.parametrize("num_new", [1, 40])
def test_paged_attention_equals_dense_attention_for_rows_of_any_length(
    window: int | None, num_new: int
) -> None:
    rng = np.random.default_rng(1)
    lengths, pages, table = [600, 5, 256], 160, rng.permutation(160)[:123].reshape(3, 41)
    q = rng.standard_normal((3, num_new, 4, 16)).astype(np.float32)
    cache = (jnp.zeros((pages, BLOCK_SIZE, 2, 16)), jnp.zeros((pages, BLOCK_SIZE, 2, 16)))
    k, v = rng.standard_normal((2, 3, 641, 2, 16)).astype(np.float32)

    def written(start: list[int], width: int, count: list[int]) -> attention.AttentionPlan:
        tokens = jnp.zeros((3, width), jnp.int32)
        batch = StepBatch(tokens, jnp.array(start, jnp.int32), jnp.array(count, jnp.int32), ())
        return attention.plan_attention(batch, jnp.asarray(table, jnp.int32), BLOCK_SIZE, window)

    cache = attention.write_kv(written([0, 0, 0], 641, lengths), cache, k, v)
    plan = written(lengths, num_new, [num_new] * 3)
    new = [np.stack([part[i, n : n + num_new] for i, n in enumerate(lengths)]) for part in (k, v)]
    cache = attention.write_kv(plan, cache, *new)
    actual = np.asarray(attention.attend(plan, cache, q, 1.0))
    for i, length in enumerate(lengths):
        end = length + num_new
        expected = dense_attention(q[i], k[i, :end], v[i, :end], length, window)
        np.testing.assert_allclose(actual[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 32), (32, 32), (75, 32), (20, 64)])
def test_chunked_ssd_equals_the_recurrence(tokens: int, chunk: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, tokens, 4, 3)).astype(np.float32)
    dt = rng.uniform(0, 1, (2, tokens, 4)).astype(np.float32)
    dt[1, tokens // 2 :] = 0
    a = -rng.uniform(0.5, 8, 4).astype(np.float32)
    b, c = rng.standard_normal((2, 2, tokens, 2, 5)).astype(np.float32)
    state = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    y, last = ssd.chunked_ssd(ssd.SSDInputs(x, dt, a, b, c), state, chunk)
    expected = state.astype(np.float64)
    for t in range(tokens):
        b_t, c_t = (np.repeat(part[:, t], 2, axis=1) for part in (b, c))
        decay = np.exp(a * dt[:, t])[..., None, None]
        expected = decay * expected + np.einsum("bhd,bhn->bhdn", x[:, t] * dt[:, t, :, None], b_t)
        np.testing.assert_allclose(y[:, t], np.einsum("bhdn,bhn->bhd", expected, c_t), atol=1e-4, rtol=0)
    np.testing.assert_allclose(last, expected, atol=1e-4, rtol=0)
