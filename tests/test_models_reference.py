"""The three models against tokens and logits of an independent implementation (see each file's ``meta``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jaxkv_models import load_model
from models_driver import DATA, Runner, read_cases, steps_to_compare

from jaxkv.serving.model import Model

LOGIT_TOLERANCE = 0.005
GEMMA_MARGIN, TINY_MARGIN = 0.002, 0.0005
TINY_MODELS = ("tiny_recurrent_gemma", "tiny_bamba")


def assert_matches(case: dict[str, Any], first_logits: np.ndarray, output: list[int], margin: float) -> None:
    top5 = first_logits[case["first_top5_ids"]]
    np.testing.assert_allclose(top5, case["first_top5_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    steps = steps_to_compare(case, margin)
    assert output[:steps] == case["greedy_ids"][:steps]


@pytest.fixture(scope="module", params=TINY_MODELS)
def tiny_model(request: pytest.FixtureRequest) -> tuple[str, Model]:
    return request.param, load_model(DATA / request.param)


@pytest.mark.parametrize("index", range(4))
def test_tiny_model_reproduces_the_reference(tiny_model: tuple[str, Model], index: int) -> None:
    name, model = tiny_model
    case = read_cases(DATA / name / "reference.json")[index]
    runner = Runner(model)
    request = runner.requests[0]
    first_logits = runner.prefill(request, case["prompt_ids"])
    (output,) = runner.decode([request], [int(first_logits.argmax())], len(case["greedy_ids"]))
    assert_matches(case, first_logits, output, TINY_MARGIN)


def test_gemma3_270m_reproduces_every_reference_case_while_decoding_them_together() -> None:
    cases = read_cases(DATA / "gemma3_270m_reference.json")
    runner = Runner(load_model("gemma3-270m"), num_requests=len(cases), max_tokens=2304)
    first = [
        runner.prefill(request, case["prompt_ids"])
        for request, case in zip(runner.requests, cases, strict=True)
    ]
    rows = [*runner.requests, None, None]
    tokens = [*(int(logits.argmax()) for logits in first), 0, 0]
    outputs = runner.decode(rows, tokens, len(cases[0]["greedy_ids"]))
    for case, logits, output in zip(cases, first, outputs, strict=False):
        assert_matches(case, logits, output, GEMMA_MARGIN)
