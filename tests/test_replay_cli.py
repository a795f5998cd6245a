"""``jaxkv replay``: its help, tables, JSON, plot and errors."""

from __future__ import annotations

import json
import sys

import pytest

import jaxkv.cli
from jaxkv.cli.main import main
from jaxkv.replay.trace_file import load_trace

SMALL = [
    "replay", "--model", "llama-like", "--requests", "12", "--max-tokens", "2048", "--document-tokens", "300",
    "--device-bytes", "512MiB", "--prefill-tokens", "512",
]  # fmt: skip


def test_tables_show_origins_the_optimum_and_traffic(capsys):
    assert main([*SMALL, "--host-bytes", "1GiB", "256MiB"]) == 0
    text = capsys.readouterr().out
    assert "llama-like: 12 requests" in text
    rows = [line.split() for line in text.splitlines() if line.split()[1:3] == ["lru", "dense"]]
    hits = [row for row in rows if "device" not in row]
    assert [row[0] for row in hits] == ["0.25", "1"]
    for row in hits:
        device, host, computed, hit, optimum, limit = map(float, row[3:9])
        assert device + host + computed == pytest.approx(100, abs=0.2)
        assert hit <= optimum <= limit
    assert max(map(len, text.splitlines())) <= 80


def test_json_has_every_run_and_what_it_was_measured_with(capsys):
    assert main([*SMALL, "--host-bytes", "256MiB", "1GiB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["environment"]["jaxkv"]
    assert document["trace"]["requests"] == 12
    assert [run["deployment"]["host_bytes"] for run in document["runs"]] == [256 << 20, 1 << 30]
    for run in document["runs"]:
        assert run["device_tokens"] + run["host_tokens"] + run["computed_tokens"] == run["prompt_tokens"]


def test_plot_is_a_png(tmp_path, capsys):
    path = tmp_path / "plot.png"
    assert main([*SMALL, "--host-bytes", "256MiB", "1GiB", "--json", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_saved_trace_replays_as_the_one_it_was_generated_from(tmp_path, capsys):
    path = str(tmp_path / "trace.jsonl")
    assert main([*SMALL, "--host-bytes", "1GiB", "--json", "--save-trace", path]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(load_trace(tmp_path / "trace.jsonl")) == 12
    again = [*SMALL, "--host-bytes", "1GiB", "--json", "--trace", path, "--requests", "5"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_help_says_what_the_columns_mean(capsys):
    with pytest.raises(SystemExit):
        main(["replay", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--host-bytes", "Belady", "servable distinct prompts", "jaxkv replay --retention dense 0"):
        assert part in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host-bytes", "lots"], "cannot read the size 'lots'"),
        (["--branch-share", "2"], "must be a number within 0 and 1, got '2'"),
        (["--retention", "-1"], "must be a whole number"),
    ],
)
def test_bad_arguments_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_of_ones_own_is_a_function_at_a_dotted_path(capsys):
    argv = [*SMALL, "--host-bytes", "1GiB", "--json", "--model"]
    assert main([*argv, "llama-like"]) == 0
    preset = json.loads(capsys.readouterr().out)["runs"]
    assert main([*argv, "jaxkv.replay.models.llama_like"]) == 0
    own = json.loads(capsys.readouterr().out)["runs"]
    assert [run["host_tokens"] for run in own] == [run["host_tokens"] for run in preset]


@pytest.mark.parametrize("name", ["palm-like", "jaxkv.nothing.shape", "jaxkv.replay.models.palm_like"])
def test_a_model_that_is_not_known_is_a_named_error(name, capsys):
    assert main([*SMALL, "--model", name]) == 2
    assert "ConfigError" in capsys.readouterr().err


def test_a_missing_trace_is_a_named_error(capsys):
    assert main([*SMALL, "--trace", "nothing.jsonl"]) == 2
    assert "ConfigError: cannot read the trace" in capsys.readouterr().err


def test_without_the_bench_extra_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxkv.cli.replay_report", raising=False)
    monkeypatch.delattr(jaxkv.cli, "replay_report", raising=False)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main([*SMALL, "--host-bytes", "1GiB"]) == 2
    assert "pip install 'jaxkv[bench]'" in capsys.readouterr().err
