"""Programs as XLA's GPU compiler makes them for an H100, and which new arrays they make. Needs no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from jaxkv.host_pool import load_native
from jaxkv.spec import dtype_bits

TARGET = Path(__file__).parents[1] / "data" / "gpu_target_h100.txtpb"
_INSTRUCTION = re.compile(r"^  (ROOT )?(%[\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_NO_NEW_ARRAY = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
        *("while", "conditional", "call", "async-start", "async-update", "async-done", "copy-done"),
    ]
)
"""What names arrays that are there; where one of these runs a computation, that is looked through as well."""
_OURS = "jaxkv"
_IN_PLACE = frozenset(("dynamic-update-slice", "scatter", _OURS))
"""What writes parts of an operand. Where it must not, the compiler puts a copy before it."""


@cache
def h100() -> jax.Device:
    """A device to compile for. Without a compiler for it the test is skipped, unless one is required."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except NotImplementedError as error:
        if "JAXKV_REQUIRE_GPU_COMPILER" in os.environ:
            raise
        pytest.skip(f"no GPU compiler ({error}); make test-gpu-compiler installs one")
    _register_handlers()
    device: jax.Device = topology.devices[0]
    return device


def has_cuda_handlers() -> bool:
    """Whether jaxkv was built with its handlers for CUDA."""
    return importlib.util.find_spec("jaxkv._cuda") is not None


def _register_handlers() -> None:
    """XLA compiles no call without a handler, and jaxkv registers its own for CUDA only where there is a GPU.

    Where it was built without them, those for the CPU stand in: all XLA asks of a handler is whether command
    buffers may hold it. What is aliased the call says itself.
    """
    if has_cuda_handlers():
        module = importlib.import_module("jaxkv._cuda")
    elif jax.default_backend() == "cpu":
        module = load_native()
    else:
        pytest.skip("handlers for the CPU would run on this GPU; set JAX_PLATFORMS=cpu")
    for name, handler in module.ffi_targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")


def on_h100(tree: Any) -> Any:
    """The shapes of ``tree``, to compile for."""
    sharding = jax.sharding.SingleDeviceSharding(h100())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_for_h100(
    function: Callable[..., Any], *arguments: Any, donated: Iterable[int] = ()
) -> GpuProgram:
    """The program of ``function`` for arguments of these shapes, of which those numbered are donated."""
    compiled = _lower(function, arguments, donated).compile()
    memory = compiled.memory_analysis()
    return GpuProgram(memory.alias_size_in_bytes, memory.temp_size_in_bytes, compiled.as_text())


def custom_calls_for_h100(
    function: Callable[..., Any], *arguments: Any, donated: Iterable[int] = ()
) -> dict[str, int]:
    """How many custom calls that program makes ``inside`` command buffers and ``outside`` of them."""
    with tempfile.TemporaryDirectory() as dump:
        _lower(function, arguments, donated).compile({"xla_dump_to": dump})
        (thunks,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
        lines = thunks.read_text().splitlines()
    found = {"inside": 0, "outside": 0}
    depth_of_buffer = math.inf
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if depth <= depth_of_buffer:
            depth_of_buffer = depth if ": kCommandBuffer " in line else math.inf
        if ": kCustomCall " in line:
            found["inside" if depth > depth_of_buffer else "outside"] += 1
    return found


def _lower(function: Callable[..., Any], arguments: tuple[Any, ...], donated: Iterable[int]) -> Any:
    traced = jax.jit(function, donate_argnums=tuple(donated)).trace(*on_h100(arguments))
    return traced.lower(lowering_platforms=("cuda",))


def stored_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """What a leaf takes on a device, elements of less than a byte packed."""
    return leaf.size * dtype_bits(leaf.dtype) // 8


@dataclass(frozen=True)
class _Instruction:
    name: str
    type_: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w.\-]+", self.rest.partition(")")[0])

    @property
    def maker(self) -> str:
        """The opcode, or ``_OURS`` for a custom call to jaxkv."""
        return _OURS if 'custom_call_target="jaxkv_' in self.rest else self.opcode

    @property
    def fused(self) -> str | None:
        """The computation of a fusion."""
        found = re.search(r"\bcalls=(%[\w.\-]+)", self.rest)
        return found[1] if self.opcode == "fusion" and found else None


@dataclass(frozen=True)
class GpuProgram:
    """A compiled program: bytes it returns in place, bytes it takes for itself, and its HLO."""

    aliased_bytes: int
    temporary_bytes: int
    text: str

    def new_arrays(self, at_least_bytes: int) -> list[str]:
        """The opcodes of what makes arrays of that size and does not write them in place, one for each array.

        Whether a buffer really was shared is for ``temporary_bytes`` to say.
        """
        fused = {i.fused for body in self._computations.values() for i in body}
        return [
            maker
            for name, body in self._computations.items()
            if name not in fused
            for instruction in body
            for num_bytes, maker in self._made_by(instruction)
            if num_bytes >= at_least_bytes
        ]

    def aliases_of(self, target: str) -> list[int]:
        """For each custom call of ``target``, how many of its results are operands of it."""
        wanted = f'custom_call_target="{target}"'
        calls = [i.rest for body in self._computations.values() for i in body if wanted in i.rest]
        return [len(re.findall(r"\{\d+\}: \(\d+, \{\}\)", call)) for call in calls]

    def _made_by(self, instruction: _Instruction) -> Iterator[tuple[int, str]]:
        sizes = _array_bytes(instruction.type_)
        if instruction.opcode in _NO_NEW_ARRAY:
            return
        if instruction.opcode == "copy-start":
            yield sizes[0], "copy"
            return
        makers = [instruction.maker] * len(sizes)
        if instruction.fused is not None:
            makers = self._makers_in_fusion(instruction.fused)
        yield from (
            (size, maker) for size, maker in zip(sizes, makers, strict=True) if maker not in _IN_PLACE
        )

    def _makers_in_fusion(self, computation: str) -> list[str]:
        """What makes each array that a fusion returns."""
        body = {instruction.name: instruction for instruction in self._computations[computation]}
        root = next(instruction for instruction in body.values() if instruction.is_root)
        results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [_made_in(body, result).maker for result in results for _ in _array_bytes(result.type_)]

    @cached_property
    def _computations(self) -> dict[str, list[_Instruction]]:
        found: dict[str, list[_Instruction]] = {}
        for line in self.text.splitlines():
            if header := re.match(r"^(?:ENTRY )?(%[\w.\-]+) \(.*\{$", line):
                body = found.setdefault(header[1], [])
            elif match := _INSTRUCTION.match(line):
                root, name, type_, opcode, rest = match.groups()
                body.append(_Instruction(name, type_, opcode, rest, root is not None))
        return found


def _made_in(body: dict[str, _Instruction], result: _Instruction) -> _Instruction:
    """What made an array that was renamed since."""
    while result.opcode in ("bitcast", "get-tuple-element"):
        result = body[result.operands[0]]
    return result


def _array_bytes(type_: str) -> list[int]:
    """The size of each array of a type as HLO writes it, elements of less than a byte packed."""
    return [
        math.ceil(_bits(dtype) * math.prod(int(n) for n in dims.split(",") if n) / 8)
        for dtype, dims in _ARRAY.findall(type_)
    ]


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8
