"""Tokenizers: ``tokenizer.json`` as it is, or rebuilt from the vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxkv.errors import WeightsError
from jaxkv_models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Token types of GGUF files."""


def read_tokenizer_json(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises ``WeightsError`` when there is no sound one."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise WeightsError(f"{directory} has no tokenizer.json; add the model's, or give token ids")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise WeightsError(f"{path} is damaged ({error}); download it again") from error


def build_from_gguf(file: GGUFFile) -> Tokenizer:
    """A SentencePiece-style BPE tokenizer from the tokens, scores and types in ``file``.

    Every way to split a token into two others is a merge, the best scores first; so merging by rank is what
    SentencePiece does when it joins the pair with the best score.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors  # noqa: PLC0415

    tokens, scores, types = _vocabulary(file)
    merges = _merges(tokens, scores, types)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[int(file.metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    if file.metadata.get("tokenizer.ggml.add_bos_token", True):
        first_id = int(file.metadata["tokenizer.ggml.bos_token_id"])
        first = tokens[first_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, first_id)]
        )
    return tokenizer


def _vocabulary(file: GGUFFile) -> tuple[list[str], Sequence[float], Sequence[int]]:
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        raise WeightsError(
            f"{file.path} has a tokenizer of kind {kind!r}; 'llama' (SentencePiece) is supported, "
            "otherwise give token ids"
        )
    fields: list[Any] = [
        file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")
    ]
    if any(field is None for field in fields):
        raise WeightsError(f"{file.path} lacks tokens, scores or token types; convert the model again")
    tokens, scores, types = fields
    return tokens, scores.tolist(), types.tolist()


def _merges(tokens: list[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    score_of = {
        token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL
    }
    by_score = sorted(score_of, key=lambda token: -score_of[token])
    return [
        (token[:cut], token[cut:])
        for token in by_score
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
