"""Which loop copies pages, and what ``JAXKV_COPY`` changes about that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkv
from jaxkv.cli.main import main
from jaxkv.host_pool import load_native

LOOPS = ("avx512", "avx2", "neon", "portable")


def run_with(loop: str, script: str) -> str:
    """What ``script`` prints in a process of its own, because the variable is read once."""
    package = Path(jaxkv.__file__).parents[1]  # the same as here, wherever it is installed
    return subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "JAXKV_COPY": loop, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    ).stdout


def test_doctor_names_the_loop(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("copy loop"))
    assert line.split()[-1] == load_native().copy_loop()
    assert load_native().copy_loop() in LOOPS


@pytest.mark.parametrize("loop", ["portable", ""])
def test_the_variable_names_the_loop_and_nothing_means_the_fastest(loop):
    script = "from jaxkv.host_pool import load_native; print(load_native().copy_loop())"
    assert run_with(loop, script).strip() == (loop or load_native().copy_loop())


def test_a_loop_this_machine_does_not_have_is_an_error_before_anything_is_copied():
    script = """
from jaxkv.errors import ConfigError
from jaxkv.host_pool import load_native
from jaxkv.transfer.targets import register_targets
for refused in (load_native().copy_loop, register_targets):
    try:
        refused()
    except ConfigError as error:
        print(error)
"""
    first, second = run_with("sse9", script).splitlines()
    assert first == second
    assert first.startswith('JAXKV_COPY is "sse9", but this machine copies by ')
    assert first.endswith("portable; leave it unset for the fastest")
