"""The command line: help, doctor, the demo's workload, report and verdict."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

import jaxkv.cli
from jaxkv.cli.demo_run import _verdict
from jaxkv.cli.main import main
from jaxkv.cli.report import Comparison, print_report, save_plot
from jaxkv.cli.workload import Turn, longest_request, make_conversations, num_turns
from jaxkv.connector import ConnectorStats, GroupStats, HistogramStats
from jaxkv.serving import RequestMetrics

NOTHING = HistogramStats((), (0,), 0.0)
STATS = ConnectorStats(
    groups=(GroupStats("full_attention", stored_bytes=3 << 20, loaded_bytes=2 << 20, evicted_chunks=4),),
    store_seconds=0.001,
    load_seconds=0.001,
    hit_tokens=96,
    queried_tokens=96,
    deferred={},
    store_sizes=NOTHING,
    load_sizes=NOTHING,
    lookup_seconds=NOTHING,
    wait_seconds=NOTHING,
    backend=None,
)


def turn(number: int, ttft_s: float, host: int = 0, output: tuple[int, ...] = (1, 2)) -> Turn:
    return Turn("A talk", number, RequestMetrics(100, 0, host, 100 - host, ttft_s), output)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison([turn(1, 2.0), turn(2, 2.0)], [turn(1, 2.0), turn(2, 0.1, 96)], STATS, 7)


def printed(comparison: Comparison) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=80)
    print_report(console, comparison)
    status = _verdict(console, comparison)
    return status, console.file.getvalue()


def test_report_shows_where_prompts_came_from_and_the_median_speedup(comparison):
    status, text = printed(comparison)
    assert status == 0
    row = next(line.split() for line in text.splitlines() if "turn 2" in line)
    assert row[-7:] == ["100", "0", "96", "4", "100", "2000", "20.0"]
    assert "20.0 times shorter" in text
    assert "stored 3 MiB" in text
    assert "loaded 2 MiB" in text
    assert "evicted 7 device blocks, 4 host chunks" in text
    assert "tokens equal with offloading on and off: yes" in text
    assert max(map(len, text.splitlines())) <= 80


def test_verdict_fails_when_tokens_differ(comparison):
    differing = replace(comparison, on=[turn(1, 2.0), turn(2, 0.1, 96, output=(1, 3))])
    status, text = printed(differing)
    assert status == 1
    assert "tokens equal with offloading on and off: NO" in text


def test_verdict_fails_when_nothing_was_loaded(comparison):
    nothing = replace(STATS, groups=(GroupStats("full_attention"),))
    status, text = printed(replace(comparison, on=comparison.off, transfers=nothing))
    assert status == 1
    assert "nothing was loaded" in text


def test_plot_is_a_png(comparison, tmp_path):
    path = tmp_path / "plot.png"
    save_plot(path, comparison)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_conversations_share_documents_and_differ_in_questions():
    talks = make_conversations(lambda text: [2, *text.encode()], 200)
    assert len(talks) == 6
    assert len({talk.opening for talk in talks}) == 3
    assert all(len(talk.opening) == 200 for talk in talks)
    assert len({talk.questions for talk in talks}) == 2
    assert num_turns(talks) == 12
    assert longest_request(talks, 16) == max(
        200 + sum(len(question) + 16 for question in talk.questions) for talk in talks
    )


def test_doctor_names_versions_and_tries_the_pool(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "jax, jaxlib, numpy" in text
    assert "host pool" in text
    assert "works" in text


def test_help_explains_the_demo(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for part in ("--device-bytes", "--host-bytes", "come back from the host pool", "Exit status 1"):
        assert part in " ".join(text.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--device-bytes", "lots"], "cannot read the size 'lots'"),
        (["demo", "--reply-tokens", "0"], "must be a whole number of at least 1, got '0'"),
        (["fly"], "invalid choice"),
    ],
)
def test_bad_arguments_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_is_a_named_error(capsys, tmp_path):
    assert main(["demo", "--model", str(tmp_path / "nothing.gguf")]) == 2
    assert "WeightsError" in capsys.readouterr().err


def test_without_the_demo_extra_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxkv.cli.demo_run")
    monkeypatch.delattr(jaxkv.cli, "demo_run")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["demo"]) == 2
    assert "pip install 'jaxkv[demo]'" in capsys.readouterr().err


def test_a_device_cache_too_small_for_a_conversation_is_a_named_error(capsys):
    assert main(["demo", "--device-bytes", "1MiB"]) == 2
    assert "bytes would suffice" in capsys.readouterr().err
