"""What nvcc made of the kernels: vectors of 16 bytes, nothing in local memory, code for every card."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
"""Where the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put them."""

Listing = dict[tuple[str, str], str]
"""Text by architecture and kernel."""


def extension() -> Path | None:
    found = importlib.util.find_spec("jaxkv._cuda")
    return None if found is None or found.origin is None else Path(found.origin)


@cache
def dump(option: str) -> str:
    path = extension()
    if path is None:
        pytest.skip("jaxkv was built without its CUDA extension, since there is no nvcc")
    tool = shutil.which("cuobjdump", path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("there is no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [tool, option, path], capture_output=True, text=True, check=True, env=environment
    ).stdout


def by_kernel(text: str) -> Listing:
    found: Listing = {}
    architecture = ""
    for part in re.split(r"(?=^\s*Function\b|^arch = )", text, flags=re.MULTILINE):
        if named := re.match(r"arch = (\w+)", part):
            architecture = named[1]
        elif named := re.match(r"\s*Function\s*:?\s*(\S+?):?\s", part):
            found[architecture, named[1]] = part
    return found


def page_kernels(listing: Listing) -> Listing:
    return {key: text for key, text in listing.items() if "MovePagesKernel" in key[1]}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build it with")
def test_the_extension_is_built_where_there_is_nvcc() -> None:
    assert extension() is not None


def test_there_is_code_for_every_architecture_and_for_those_to_come() -> None:
    kernels = page_kernels(by_kernel(dump("--dump-sass")))
    assert sorted(architecture for architecture, _ in kernels) == sorted(2 * ARCHITECTURES)
    assert re.search(r"sm_100\.ptx", dump("--list-ptx"))


def test_pages_move_in_vectors_of_16_bytes_four_abreast() -> None:
    for key, code in page_kernels(by_kernel(dump("--dump-sass"))).items():
        loads = len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", code))
        stores = len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", code))
        assert (loads >= 5, stores >= 5) == (True, True), (key, loads, stores)


def test_vectors_pass_the_caches_by() -> None:
    for key, code in page_kernels(by_kernel(dump("--dump-sass"))).items():
        wide = re.findall(r"\b(?:LDG|STG)\.E\.(?:\w+\.)*128\b", code)
        assert wide
        assert all(".EF." in access for access in wide), (key, wide)


def test_no_kernel_uses_local_memory() -> None:
    usage = by_kernel(dump("--dump-resource-usage"))
    assert {architecture for architecture, _ in usage} == set(ARCHITECTURES)
    for key, text in usage.items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", text), (key, text)
    for key, code in by_kernel(dump("--dump-sass")).items():
        assert not re.search(r"\b(?:LDL|STL)\b", code), key
