"""Processes of their own, for what uses up memory or settings of one, or ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxkv

TIMEOUT_S = 240
TESTS = Path(__file__).parents[1]


def run_scenario(name: str, *, exit_status: int = 0, **environment: str) -> str:
    """What one of ``scenarios.py`` prints. Fails where it ends with another status, or does not end."""
    return run_python([str(TESTS / "cuda" / "scenarios.py"), name], exit_status=exit_status, **environment)


def run_python(arguments: Sequence[str], *, exit_status: int = 0, **environment: str) -> str:
    """The same for any arguments of Python."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    folders = [TESTS, TESTS / "cuda", Path(jaxkv.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    given["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    ended = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=given | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == exit_status, f"exit status {ended.returncode}\n{output[-6000:]}"
    return output
