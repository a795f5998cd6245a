"""Puts a model, a budget of device bytes and a host pool together into an engine ready to serve."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.connector import OffloadingConfig, OffloadingConnector
from jaxkv.layout import LayoutHint
from jaxkv.serving.config import EngineConfig
from jaxkv.serving.engine import LLMEngine
from jaxkv.serving.model import Model
from jaxkv.serving.sizing import divide_device_bytes

DEFAULT_BLOCK_SIZE = 16
"""Tokens per block."""


def build_engine(
    model: Model,
    *,
    device_bytes: int,
    max_tokens: int,
    offloading: OffloadingConfig | None = None,
    engine_config: EngineConfig | None = None,
    cache_dtype: DTypeLike = jnp.float32,
) -> LLMEngine:
    """An engine whose caches take at most ``device_bytes``, for requests of up to ``max_tokens`` tokens.

    ``max_tokens`` counts prompt and new tokens. Without ``offloading`` only the device caches prefixes.
    Raises ``ConfigError`` where the device or the host budget is too small, with what would suffice.
    """
    config = replace(engine_config or EngineConfig(), max_model_len=max_tokens)
    groups = model.cache_groups(DEFAULT_BLOCK_SIZE, cache_dtype)
    cache_config = divide_device_bytes(groups, device_bytes, max_tokens, config.prefill_shapes)
    hints = {name: LayoutHint(block_axis=0) for names, _ in groups for name in names}
    connector = None if offloading is None else OffloadingConnector(offloading, cache_config, hints=hints)
    try:
        return LLMEngine(model, cache_config, config, connector)
    except BaseException:
        if connector is not None:
            connector.shutdown()
        raise
