"""The example's contract: what it reads, what it writes, what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemma_hybrid
import pytest
from jax.stages import Compiled, Lowered

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
TINY = {name: DATA / name for name in ("tiny_recurrent_gemma", "tiny_bamba")}
DEVICE_BYTES = {"tiny_recurrent_gemma": "160KiB", "tiny_bamba": "640KiB"}
ABSENT = object()


def arguments(tiny: str, out: Path, **changes: Any) -> list[str]:
    """A command line that works for a tiny model, with some arguments replaced or left out."""
    options = {
        "model": TINY[tiny],
        "prompts": TINY[tiny] / "reference.json",
        "max-new-tokens": 32,
        "passes": 1,
        "offload": "on",
        "device-bytes": DEVICE_BYTES[tiny],
        "host-bytes": "16MiB",
        "out": out,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [
        text for name, value in options.items() if value is not ABSENT for text in (f"--{name}", str(value))
    ]


def run(model: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    out = tmp_path / "result.json"
    assert gemma_hybrid.main(arguments(model, out, **changes)) == 0
    return json.loads(out.read_text())


def reference(model: str) -> list[dict[str, Any]]:
    return json.loads((TINY[model] / "reference.json").read_text())["cases"]


@pytest.fixture(scope="module", autouse=True)
def same_programs_compiled_once() -> Iterator[None]:
    """Each run lowers all its programs; those that an earlier run has lowered are not compiled again."""
    compile_lowered, compiled = Lowered.compile, dict[Any, Compiled]()

    def compile_once(lowered: Lowered) -> Compiled:
        key = lowered.as_text(), lowered.in_tree, lowered.out_tree
        if key not in compiled:
            compiled[key] = compile_lowered(lowered)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lowered, "compile", compile_once)
        yield


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def result_on(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(model, tmp_path_factory.mktemp("on"), passes=2)


def test_result_has_every_request_of_every_pass_in_order_with_reference_tokens(model, result_on):
    result, cases = result_on, reference(model)
    assert set(result) == {"requests", "totals"}
    assert [(r["name"], r["pass"]) for r in result["requests"]] == [
        (f"case{i}", number) for number in (1, 2) for i in range(len(cases))
    ]
    for record, case in zip(result["requests"], cases * 2, strict=True):
        steps = next((i for i, margin in enumerate(case["margins"]) if margin < 0.0005), len(case["margins"]))
        assert record["output_ids"][:steps] == case["greedy_ids"][:steps]
        assert len(record["output_ids"]) == 32
        counts = (record["device_hit_tokens"], record["host_hit_tokens"], record["computed_tokens"])
        assert sum(counts) == record["prompt_tokens"] == len(case["prompt_ids"])
        assert record["ttft_s"] > 0
    longest = result["requests"][-1]
    assert longest["device_hit_tokens"] + longest["host_hit_tokens"] == 192
    totals = result["totals"]
    assert set(totals) == {
        "stored_bytes",
        "loaded_bytes",
        "device_evictions",
        "host_evictions",
        "compilations_after_warmup",
    }
    assert totals["stored_bytes"] > 0
    assert totals["loaded_bytes"] > 0
    assert totals["compilations_after_warmup"] == 0


def test_offload_off_gives_the_same_tokens_and_moves_nothing(model, result_on, tmp_path):
    off = run(model, tmp_path, passes=2, offload="off")
    assert [r["output_ids"] for r in result_on["requests"]] == [r["output_ids"] for r in off["requests"]]
    assert off["totals"]["stored_bytes"] == off["totals"]["loaded_bytes"] == 0
    assert all(r["host_hit_tokens"] == 0 for r in off["requests"])


def test_prompts_may_be_a_plain_list_with_names(tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"name": "greeting", "prompt_ids": [5, 6, 7]}]))
    result = run("tiny_bamba", tmp_path, prompts=prompts, max_new_tokens=30)  # as long as bad ones
    assert [(r["name"], len(r["output_ids"])) for r in result["requests"]] == [("greeting", 30)]


def test_the_error_for_too_few_device_bytes_names_what_suffices(tmp_path, capsys):
    model = "tiny_recurrent_gemma"
    assert gemma_hybrid.main(arguments(model, tmp_path / "r.json", device_bytes="1KiB")) == 2
    message = capsys.readouterr().err
    assert "ConfigError: 1024 device bytes cannot serve" in message
    enough = int(message.split(" bytes would suffice")[0].split()[-1])
    result = run(model, tmp_path, device_bytes=enough, max_new_tokens=32)
    assert len(result["requests"]) == 4
    assert gemma_hybrid.main(arguments(model, tmp_path / "r.json", device_bytes=enough - 1)) == 2


BAD_PROMPTS = {
    "empty prompt": ([{"prompt_ids": []}], "RequestError: prompt 0 of", "is empty"),
    "no list": ({"prompts": []}, "RequestError", "holds no prompts"),
    "no ids": ([{"name": "x"}], "RequestError", 'has no "prompt_ids"'),
    "text for ids": ([{"prompt_ids": ["a"]}], "RequestError", "a list of integers"),
    "unknown token": ([{"prompt_ids": [512]}], "RequestError", "must lie in [0, 512)"),
    "longer than the model": ([{"prompt_ids": [1] * 262144}], "RequestError", "shorten the prompt"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused_with_what_is_wrong(name, tmp_path, capsys):
    content, kind, part = BAD_PROMPTS[name]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(content))
    assert gemma_hybrid.main(arguments("tiny_bamba", tmp_path / "r.json", prompts=prompts)) == 2
    message = capsys.readouterr().err
    assert kind in message
    assert part in message


BAD_OPTIONS = {
    "missing model": ({"model": "/nowhere"}, "WeightsError"),
    "missing prompts": ({"prompts": "/nowhere.json"}, "RequestError: cannot read prompts from /nowhere.json"),
    "host bytes below one block": ({"host_bytes": "1KiB"}, "ConfigError"),
    "host bytes beyond the machine": ({"host_bytes": "1000TiB"}, "ConfigError"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_with_a_named_error(name, tmp_path, capsys):
    changes, message = BAD_OPTIONS[name]
    assert gemma_hybrid.main(arguments("tiny_bamba", tmp_path / "r.json", **changes)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": 0}, "must be a whole number of at least 1, got '0'"),
        ({"max_new_tokens": "many"}, "must be a whole number of at least 1, got 'many'"),
        ({"host_bytes": "lots"}, "cannot read the size 'lots'"),
        ({"offload": "perhaps"}, "invalid choice"),
        ({"prompts": ABSENT}, "required: --prompts"),
    ],
)
def test_the_command_line_says_what_it_takes(changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gemma_hybrid.main(arguments("tiny_bamba", tmp_path / "r.json", **changes))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_keeps_the_finished_requests_and_exits_with_130(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-u", str(ROOT / "examples" / "gemma_hybrid.py")]
    with subprocess.Popen(
        command + arguments("tiny_bamba", out, passes=100_000),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stderr is not None
        served = [process.stderr.readline() for _ in range(3)]
        assert all(line.startswith("pass 1") for line in served), served
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "interrupted after" in rest
    requests = json.loads(out.read_text())["requests"]
    assert len(requests) >= 3
    assert all(len(record["output_ids"]) == 32 for record in requests)


def test_resident_memory_stays_under_weights_caches_pool_and_a_fixed_allowance(tmp_path):
    weights, device, host, allowance = 268_098_176 * 4, 48 << 20, 256 << 20, 3 << 29
    prompts = tmp_path / "prompts.json"
    cases = json.loads((DATA / "gemma3_270m_reference.json").read_text())["cases"]
    prompts.write_text(json.dumps([case for case in cases if case["name"] == "apache-1400-a"]))
    options = arguments(
        "tiny_bamba",
        tmp_path / "result.json",
        model="gemma3-270m",
        prompts=prompts,
        passes=2,
        max_new_tokens=2,
        device_bytes=device,
        host_bytes=host,
    )
    command = [sys.executable, str(ROOT / "examples" / "gemma_hybrid.py"), *options]
    # Linux counts the peak of the process that starts a program as the program's: a small one starts it.
    launcher = "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True); "
    launcher += "print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    launched = subprocess.run([sys.executable, "-c", launcher, *command], check=True, stdout=subprocess.PIPE)
    peak_bytes = int(launched.stdout.split()[-1])
    assert weights < peak_bytes < weights + device + host + allowance
