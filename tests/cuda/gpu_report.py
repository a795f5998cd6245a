"""Runs everything that wants a GPU and writes a report: ``python tests/cuda/gpu_report.py --output DIR``.

The tests marked ``cuda``: first those that share the device, in several processes, then those marked
``alone``. Then ``jaxkv bench cuda``. Into the folder go ``report.md``, ``report.json`` with all figures, and
what pytest and the benchmark wrote. Exits with status 1 where a test or the benchmark failed, or no test ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
MOST_JOBS = 8
GPU_FACTS = ("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max")
JUNIT = ("-o", "junit_family=xunit1")  # the one that keeps what tests measured
COUNTS = ("tests", "failures", "errors", "skipped")


@dataclass
class Suite:
    """What pytest said of one run: how many tests, and which of them failed, were skipped or measured."""

    name: str
    seconds: float
    exit_status: int
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.exit_status == 0 and self.counts.get("tests", 0) > self.counts.get("skipped", 0)


def run_suite(name: str, marks: str, options: Sequence[str], output: Path) -> Suite:
    """Run the tests with these marks. What pytest prints goes to the screen and to a file."""
    junit = output / f"{name}.xml"
    chosen = ["-m", marks, "--ignore=tests/families", f"--junitxml={junit}", *JUNIT, *options]
    command = [sys.executable, "-P", "-m", "pytest", *chosen]
    print(f"== {' '.join(command)}", flush=True)
    started = perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        (output / f"{name}.txt").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)
    suite = Suite(name, perf_counter() - started, process.returncode)
    if junit.exists():
        read_junit(junit, suite)
    return suite


def read_junit(junit: Path, suite: Suite) -> None:
    for found in ElementTree.parse(junit).iter("testsuite"):
        for count in COUNTS:
            suite.counts[count] = suite.counts.get(count, 0) + int(found.get(count, 0))
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            suite.failed.append(name)
        skipped = case.find("skipped")
        if skipped is not None:
            reason = skipped.get("message", "")
            suite.skipped[reason] = suite.skipped.get(reason, 0) + 1
        figures = {found.get("name", ""): float(found.get("value", "nan")) for found in case.iter("property")}
        if figures:
            suite.measured[name] = figures


def describe_gpus() -> list[dict[str, str]]:
    """The GPUs as the driver names them; none where there is no ``nvidia-smi``."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(GPU_FACTS, line.split(", "), strict=False)) for line in told.splitlines()]


def describe_installation() -> str:
    command = [sys.executable, "-P", "-c", "import sys, jaxkv.cli.main as m; sys.exit(m.main())", "doctor"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return told.stdout + told.stderr


def run_benchmark(options: Sequence[str], output: Path) -> tuple[dict[str, Any] | None, str]:
    """The figures of ``jaxkv bench cuda`` as JSON and as tables; nothing and why where it failed."""
    program = [sys.executable, str(Path(__file__)), "--only-benchmark", str(output / "benchmark.json")]
    print(f"== jaxkv bench cuda {' '.join(options)}", flush=True)
    ended = subprocess.run(
        [*program, "--bench-options", *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    text = ended.stdout if ended.returncode == 0 else ended.stdout + ended.stderr
    print(text, flush=True)
    figures = output / "benchmark.json"
    return (json.loads(figures.read_text()) if ended.returncode == 0 else None), text


def measure(path: Path, options: Sequence[str]) -> None:
    """In a process of its own: print the tables, write the JSON."""
    from rich.console import Console  # noqa: PLC0415

    from jaxkv.cli.bench.base import document  # noqa: PLC0415
    from jaxkv.cli.bench.cuda_command import CudaBench  # noqa: PLC0415
    from jaxkv.cli.bench.cuda_report import print_cuda  # noqa: PLC0415

    bench, parser = CudaBench(), argparse.ArgumentParser()
    bench.add_options(parser)
    figures = bench.measure(parser.parse_args(options), lambda line: print(line, file=sys.stderr))
    print_cuda(figures, Console(width=120))
    path.write_text(json.dumps(document(bench, figures), indent=2) + "\n")


def write_report(output: Path, facts: dict[str, Any], suites: Sequence[Suite], tables: str) -> None:
    lines = ["# GPU report", ""]
    lines += ["* " + ", ".join(f"{name} {value}" for name, value in gpu.items()) for gpu in facts["gpus"]]
    lines += ["", "```", facts["installation"].strip(), "```", "", "## Tests", ""]
    lines += ["| run | tests | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for suite in suites:
        counts = suite.counts
        failed = counts.get("failures", 0) + counts.get("errors", 0)
        lines.append(
            f"| {suite.name} | {counts.get('tests', 0)} | {failed} | {counts.get('skipped', 0)} "
            f"| {suite.seconds:.0f} |"
        )
    for suite in suites:
        lines += ["", *(f"* failed: `{name}`" for name in suite.failed)]
        lines += [f"* {count} skipped: {reason}" for reason, count in suite.skipped.items()]
        for name, figures in suite.measured.items():
            told = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            lines.append(f"* `{name.partition('::')[2]}`: {told}")
    if tables:
        lines += ["", "## Benchmark", "", "```", tables.rstrip(), "```"]
    (output / "report.md").write_text("\n".join(lines) + "\n")
    everything = facts | {"suites": [asdict(suite) for suite in suites]}
    (output / "report.json").write_text(json.dumps(everything, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder (default gpu-report)")
    jobs = min(MOST_JOBS, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes of tests (default {jobs})")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmark")
    parser.add_argument("--no-benchmark", action="store_true", help="only the tests")
    parser.add_argument("--only-benchmark", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--bench-options", nargs=argparse.REMAINDER, default=[], help="the rest goes to 'jaxkv bench cuda'"
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.only_benchmark is not None:
        measure(args.only_benchmark, args.bench_options)
        return 0
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"gpus": describe_gpus(), "installation": describe_installation()}
    print(facts["installation"])
    suites, tables = [], ""
    if not args.no_tests:
        shared = ["-n", str(args.jobs), "--dist", "worksteal"] if args.jobs > 1 else []
        suites = [
            run_suite("together", "cuda and not alone", shared, output),
            run_suite("alone", "cuda and alone", [], output),
        ]
    if not args.no_benchmark:
        facts["benchmark"], tables = run_benchmark(args.bench_options, output)
    write_report(output, facts, suites, tables)
    print(f"report: {output / 'report.md'}")
    is_measured = args.no_benchmark or facts["benchmark"] is not None
    return 0 if is_measured and all(suite.passed for suite in suites) else 1


if __name__ == "__main__":
    sys.exit(main())
