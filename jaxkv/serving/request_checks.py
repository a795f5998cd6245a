"""What a request must be to be served by an engine; each check raises ``RequestError`` with the remedy."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from jaxkv.errors import RequestError
from jaxkv.key_parts import CacheKeyParts
from jaxkv.serving.sizing import blocks_to_serve
from jaxkv.spec import KVCacheConfig


def check_prompt(prompt_ids: npt.NDArray[Any], vocab_size: int) -> None:
    """A prompt is a non-empty list of tokens the model knows."""
    if len(prompt_ids) == 0:
        raise RequestError("the prompt is empty; pass at least one token")
    if prompt_ids.ndim != 1 or prompt_ids.dtype.kind not in "iu":
        raise RequestError(f"a prompt is a list of whole numbers, got {prompt_ids.dtype}{prompt_ids.shape}")
    lowest, highest = prompt_ids.min(), prompt_ids.max()
    if not 0 <= lowest <= highest < vocab_size:
        raise RequestError(f"prompt tokens must lie in [0, {vocab_size}), got {lowest} to {highest}")


def check_fits(
    num_prompt_tokens: int, max_new_tokens: int, max_model_len: int, cache_config: KVCacheConfig
) -> None:
    """The model takes so many tokens, and the empty cache holds them."""
    num_tokens = num_prompt_tokens + max_new_tokens
    if num_tokens > max_model_len:
        raise RequestError(
            f"{num_prompt_tokens} prompt tokens and {max_new_tokens} new ones are more than the "
            f"{max_model_len} a sequence may have; shorten the prompt or raise max_model_len"
        )
    for group in cache_config.groups:
        # The last new token is never an input, so it needs no room.
        needed = blocks_to_serve(group.spec, num_tokens - 1, chunk_tokens=1)
        if needed > group.num_blocks:
            raise RequestError(
                f"a request of {num_tokens} tokens needs {needed} blocks of {type(group.spec).__name__} "
                f"but the cache has {group.num_blocks}; {needed * group.page_size_bytes} bytes for this "
                f"group would suffice"
            )


def check_parts(parts: CacheKeyParts, num_prompt_tokens: int) -> None:
    """Inputs and embeddings lie in the prompt."""
    if parts.end_token > num_prompt_tokens:
        raise RequestError(
            f"an input or embedding of the request ends at token {parts.end_token}, but its prompt has "
            f"{num_prompt_tokens} tokens; give places in the prompt as it was passed"
        )
