"""Reads Hugging Face model directories: ``config.json`` and ``*.safetensors``, tensors as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from jaxkv.errors import WeightsError
from jaxkv_models.arrays import SLICE_ELEMENTS, HostTensor, aligned_empty, check_shape


@final
@dataclass(frozen=True, slots=True)
class HFWeights:
    """The tensors of a directory. ``files`` maps a name without its ``prefix`` to the file that holds it."""

    directory: Path
    prefix: str
    files: Mapping[str, Path]

    def read(self, name: str, shape: tuple[int, ...]) -> HostTensor:
        """Tensor ``name`` as float32. Raises ``WeightsError`` when it is missing or not of ``shape``."""
        from safetensors import safe_open  # noqa: PLC0415

        full_name = self.prefix + name if self.prefix + name in self.files else name
        path = self.files.get(full_name)
        if path is None:
            raise WeightsError(
                f"no *.safetensors file in {self.directory} has tensor {self.prefix + name!r}; "
                "download every shard of the model"
            )
        with safe_open(path, framework="np") as file:
            source = file.get_slice(full_name)
            check_shape(f"{full_name!r} of {path}", tuple(source.get_shape()), shape)
            out = aligned_empty(shape)
            step = max(1, SLICE_ELEMENTS // max(1, out[:1].size))
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                out[start:stop] = source[start:stop]
        return out


@final
@dataclass(frozen=True, slots=True)
class HFDirectory:
    """A model directory and its parsed ``config``."""

    path: Path
    config: Mapping[str, Any]

    def value(self, key: str) -> Any:
        """The entry ``key`` of the config. Raises ``WeightsError`` when it is not there."""
        return require(self.config, key, self.path)

    def weights(self, prefixes: Sequence[str] = ("model.",)) -> HFWeights:
        """The tensors under the first of ``prefixes`` that has an embedding."""
        files = _tensor_files(self.path)
        for prefix in prefixes:
            if f"{prefix}embed_tokens.weight" in files:
                return HFWeights(self.path, prefix, files)
        raise WeightsError(
            f"no *.safetensors file in {self.path} has tensor '{prefixes[0]}embed_tokens.weight'; "
            "download every shard of the model"
        )


def open_directory(path: Path) -> HFDirectory:
    """Parses the config of ``path``. Raises ``WeightsError`` when there is none or it is damaged."""
    config_path = path / "config.json"
    if not config_path.is_file():
        raise WeightsError(f"{path} has no config.json; give a directory in the Hugging Face layout")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{config_path} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{config_path} is not a JSON object; download it again")
    return HFDirectory(path, config)


def require(config: Mapping[str, Any], key: str, directory: Path) -> Any:
    """``config[key]``. Raises ``WeightsError`` when it is missing."""
    if config.get(key) is None:
        raise WeightsError(f"{directory / 'config.json'} has no {key!r}; use the config of the weights")
    return config[key]


def _tensor_files(directory: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is cut off or damaged ({error}); download it again") from error
    if not files:
        raise WeightsError(f"{directory} has no *.safetensors file; convert or download the weights")
    return files
