"""Finds, checks and loads models and tokenizers by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxkv.errors import WeightsError
from jaxkv.serving.model import Model
from jaxkv_models import gemma3_weights, gemma_package, hf_models, tokenizer
from jaxkv_models.gguf_file import GGUFFile, open_gguf
from jaxkv_models.hf_directory import HFDirectory, open_directory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HF_LOADERS: dict[str, Callable[[HFDirectory, str], Model]] = {
    "bamba": hf_models.load_bamba,
    "gemma3": gemma3_weights.load_hf,
    "gemma3_text": gemma3_weights.load_hf,
    "recurrent_gemma": hf_models.load_recurrent_gemma,
}


def load_model(model: str | Path) -> Model:
    """The float32 model ``gemma3-270m``, a ``.gguf`` file, or a Hugging Face directory.

    GGUF files may be of architecture gemma3; directories of ``model_type`` bamba, gemma3, gemma3_text or
    recurrent_gemma. The model's name holds a digest of its files. Raises ``WeightsError`` for anything
    missing, cut off, altered or unsupported.
    """
    source = _open(model)
    match source:
        case GGUFFile():
            architecture = source.metadata.get("general.architecture")
            if architecture != "gemma3":
                raise WeightsError(f"{source.path} has architecture {architecture!r}; supported is gemma3")
            return gemma3_weights.load_gguf(source, _revision([source.path]))
        case HFDirectory():
            kind = source.config.get("model_type")
            if kind not in _HF_LOADERS:
                raise WeightsError(
                    f"{source.path} has model_type {kind!r}; supported are {', '.join(sorted(_HF_LOADERS))}"
                )
            files = [source.path / "config.json", *sorted(source.path.glob("*.safetensors"))]
            return _HF_LOADERS[kind](source, _revision(files))


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of what ``load_model`` takes. Raises ``WeightsError`` when it carries none."""
    source = _open(model)
    match source:
        case GGUFFile():
            return tokenizer.build_from_gguf(source)
        case HFDirectory():
            return tokenizer.read_tokenizer_json(source.path)


def _open(model: str | Path) -> GGUFFile | HFDirectory:
    if model == gemma_package.NAME:
        return open_gguf(gemma_package.cached_gguf())
    path = Path(model)
    if path.is_dir():
        return open_directory(path)
    if not path.is_file():
        raise WeightsError(
            f"there is no model {str(model)!r}; "
            f"give {gemma_package.NAME}, a .gguf file or a Hugging Face directory"
        )
    return open_gguf(path)


def _revision(files: list[Path]) -> str:
    """A name for the exact contents of ``files``, which are the weights and what gives them meaning."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(gemma_package.file_sha256(path).encode())
    place = files[0].stem if len(files) == 1 else files[0].resolve().parent.name
    return f"{place}@{digest.hexdigest()[:16]}"
