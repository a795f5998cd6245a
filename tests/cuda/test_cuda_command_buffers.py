"""The ops with XLA's command buffers (CUDA graphs) switched off, and on for all they can hold.

Flags are read when a backend starts, so tests that others run with the usual flags run here in processes of
their own.
"""

from __future__ import annotations

import os
import re

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.cuda

FLAGS = {
    "off": "--xla_gpu_enable_command_buffer=",
    "on": "--xla_gpu_enable_command_buffer=+CUSTOM_CALL,+WHILE,+CONDITIONAL --xla_gpu_graph_min_graph_size=1",
}
MODULES = ("tests/cuda/test_cuda_programs.py", "tests/test_page_ops.py", "tests/test_pool_ops.py")
SOME_LAYOUTS = "not reference or packed_kv or hybrid or mamba_two_dtypes"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("flags", FLAGS)
def test_programs_hold_whether_command_buffers_are_off_or_on(flags: str, module: str) -> None:
    options = ["-m", "cuda", "-k", SOME_LAYOUTS, "-q", "-p", "no:cacheprovider"]
    given = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[flags]}"
    output = run_python(["-m", "pytest", *options, module], XLA_FLAGS=given)
    assert re.search(r"\d+ passed", output)
    assert "skipped" not in output
