"""Reads GGUF files: metadata, tensor directory, tensors as float32. Knows nothing of models.

The ``gguf`` package turns quantized bytes into numbers. Its reader is not used, for it makes an object of
every token in the vocabulary: ten seconds and 0.7 GiB for a file that opens here in well under a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from jaxkv.errors import WeightsError
from jaxkv_models.arrays import SLICE_ELEMENTS, HostTensor, aligned_empty

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d"]))
_STRING, _ARRAY = 8, 9


@final
@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is row-major, as in NumPy; ``kind`` is ggml's type number."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@final
@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An opened file: ``metadata`` values by key and ``tensors`` by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> HostTensor:
        """The tensor ``name`` as float32. Raises ``WeightsError`` when it is missing or cut off."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # noqa: PLC0415

        info = self.tensors.get(name)
        if info is None:
            raise WeightsError(f"{self.path} has no tensor {name!r}; use a complete GGUF file of the model")
        kind = GGMLQuantizationType(info.kind)
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        row = info.shape[-1]
        row_bytes = row // block_elements * block_bytes
        out = aligned_empty(info.shape)
        rows = out.reshape(-1, row)
        step = max(1, SLICE_ELEMENTS // row)
        with self.path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, len(rows), step):
                target = rows[start : start + step]
                raw = np.fromfile(file, np.uint8, len(target) * row_bytes)
                if raw.size != len(target) * row_bytes:
                    raise WeightsError(f"{self.path} ends inside tensor {name!r}; download the file again")
                target[...] = dequantize(raw.reshape(len(target), row_bytes), kind).reshape(target.shape)
        return out


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of ``path``. Raises ``WeightsError`` when it is no GGUF file or is cut off."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise WeightsError(f"{path} is not a GGUF file; give a .gguf file of a gemma3 model")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                opened = _parse(path, _Cursor(data))
                end = len(data)
            except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
                raise WeightsError(f"{path} is cut off or damaged in its header; download again") from error
    _check_extent(opened, end)
    return opened


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 4

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self.position)
        self.position += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise IndexError(self.position)
        return self._data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(_SCALARS[kind])

    def array(self) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind])
        start, self.position = self.position, self.position + count * dtype.itemsize
        if self.position > len(self._data):
            raise IndexError(self.position)
        return np.frombuffer(self._data[start : self.position], dtype)


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise WeightsError(f"{path} has GGUF version {version}; versions {_VERSIONS} are supported")
    num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, base + offset) for name, shape, kind, offset in entries}
    return GGUFFile(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    innermost_first = [cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]
    return name, tuple(reversed(innermost_first)), cursor.scalar("<I"), cursor.scalar("<Q")


def _check_extent(opened: GGUFFile, file_bytes: int) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    known = {int(kind) for kind in GGMLQuantizationType}
    for name, info in opened.tensors.items():
        if info.kind not in known:
            raise WeightsError(
                f"{name!r} of {opened.path} has tensor type {info.kind}; update the gguf package"
            )
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)]
        end = info.offset + math.prod(info.shape) // block_elements * block_bytes
        if end > file_bytes:
            raise WeightsError(
                f"{opened.path} has {file_bytes} bytes but tensor {name!r} ends at {end}; download it again"
            )
