"""What the report of a GPU run says of pytest's output. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_report
import pytest

JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="0" skipped="2">
<testcase classname="a" name="fine"><properties><property name="hidden" value="0.75"/></properties></testcase>
<testcase classname="a" name="broken"><failure message="no"/></testcase>
<testcase classname="b" name="left_out"><skipped message="needs two GPUs"/></testcase>
<testcase classname="b" name="left_out_too"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def suite(tmp_path: Path) -> gpu_report.Suite:
    (tmp_path / "suite.xml").write_text(JUNIT)
    read = gpu_report.Suite("suite", 2.0, 0)
    gpu_report.read_junit(tmp_path / "suite.xml", read)
    return read


def test_a_report_names_what_failed_was_skipped_and_was_measured(
    suite: gpu_report.Suite, tmp_path: Path
) -> None:
    facts = {"gpus": [{"name": "some GPU"}], "installation": "jaxkv 1"}
    gpu_report.write_report(tmp_path, facts, [suite], "a table")
    text = (tmp_path / "report.md").read_text()
    for line in (
        "* name some GPU",
        "| suite | 4 | 1 | 2 | 2 |",
        "* failed: `a::broken`",
        "* 2 skipped: needs two GPUs",
        "* `fine`: hidden 0.75",
        "a table",
    ):
        assert line in text.splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["suites"][0]["failed"] == ["a::broken"]


@pytest.mark.parametrize(
    ("exit_status", "counts", "passed"),
    [(0, {"tests": 3, "skipped": 2}, True), (0, {"tests": 2, "skipped": 2}, False), (1, {"tests": 3}, False)],
)
def test_a_run_that_failed_or_ran_nothing_has_not_passed(
    exit_status: int, counts: dict[str, int], *, passed: bool
) -> None:
    assert gpu_report.Suite("suite", 1.0, exit_status, counts).passed == passed


def test_a_run_writes_what_pytest_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "pytest.py"
    script.write_text(f"print('it ran'); open({str(tmp_path / 'one.xml')!r}, 'w').write('''{JUNIT}''')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    suite = gpu_report.run_suite("one", "cuda", [], tmp_path)
    assert "it ran" in (tmp_path / "one.txt").read_text()
    assert suite.counts["tests"] == 4
