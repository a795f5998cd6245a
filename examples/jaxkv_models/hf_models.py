"""RecurrentGemma and Bamba from Hugging Face directories: reads their configs, loads their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxkv.errors import WeightsError
from jaxkv_models.arrays import HostTensor, load_tensors
from jaxkv_models.bamba import Bamba, BambaConfig
from jaxkv_models.hf_directory import HFDirectory
from jaxkv_models.recurrent_gemma import RecurrentGemma, RecurrentGemmaConfig


def load_recurrent_gemma(directory: HFDirectory, name: str) -> RecurrentGemma:
    """The model in ``directory``. Norm weights are stored around zero and get Gemma's ``1 +`` here."""
    config = _recurrent_gemma_config(directory)
    _require_both_kinds(config.is_recurrent, directory)
    shapes, weights = config.tensor_shapes(), directory.weights()

    def read(tensor: str) -> HostTensor:
        array = weights.read(tensor, shapes[tensor])
        if tensor.endswith("norm.weight"):
            array += 1.0
        return array

    return RecurrentGemma(name, config, load_tensors(shapes, read))


def load_bamba(directory: HFDirectory, name: str) -> Bamba:
    """The model in ``directory``."""
    config = _bamba_config(directory)
    _require_both_kinds(config.is_mamba, directory)
    shapes, weights = config.tensor_shapes(), directory.weights()
    return Bamba(name, config, load_tensors(shapes, lambda tensor: weights.read(tensor, shapes[tensor])))


def _require_both_kinds(kinds: tuple[bool, ...], directory: HFDirectory) -> None:
    if len(set(kinds)) != 2:
        raise WeightsError(
            f"{directory.path} has layers of one kind only; hybrid models need attention and recurrent layers"
        )


def _recurrent_gemma_config(directory: HFDirectory) -> RecurrentGemmaConfig:
    raw = directory.config
    num_heads, hidden_size = directory.value("num_attention_heads"), directory.value("hidden_size")
    if raw.get("attention_bias") or not raw.get("tie_word_embeddings", True):
        raise WeightsError(
            f"{directory.path} has attention biases or untied embeddings, which this model file does not know"
        )
    kinds = raw.get("block_types") or ("recurrent", "recurrent", "attention")
    head_size = raw.get("head_dim") or hidden_size // num_heads
    base, rotary_dim = _rope(raw, head_size)
    return RecurrentGemmaConfig(
        vocab_size=directory.value("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=directory.value("intermediate_size") // 2,
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_size=head_size,
        is_recurrent=tuple(
            kinds[layer % len(kinds)] == "recurrent" for layer in range(directory.value("num_hidden_layers"))
        ),
        lru_width=raw.get("lru_width") or hidden_size,
        conv_width=raw.get("conv1d_width", 4),
        sliding_window=raw.get("attention_window_size", 2048),
        rope_base=base,
        rotary_dim=rotary_dim,
        logit_cap=raw.get("logits_soft_cap", 30.0),
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        # Neither the window nor the recurrence bounds a sequence; the published models name 8192.
        max_model_len=raw.get("max_position_embeddings") or 8192,
    )


def _bamba_config(directory: HFDirectory) -> BambaConfig:
    raw = directory.config
    if any(raw.get(key) for key in ("attention_bias", "mamba_proj_bias", "mlp_bias")):
        raise WeightsError(f"{directory.path} has projection biases, which this model file does not know")
    num_heads, hidden_size = directory.value("num_attention_heads"), directory.value("hidden_size")
    mamba_heads, inner = directory.value("mamba_n_heads"), raw.get("mamba_expand", 2) * hidden_size
    head_size = hidden_size // num_heads
    num_layers, attention_layers = directory.value("num_hidden_layers"), raw.get("attn_layer_indices") or ()
    base, rotary_dim = _rope(raw, head_size)
    return BambaConfig(
        vocab_size=directory.value("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=directory.value("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_size=head_size,
        is_mamba=tuple(layer not in attention_layers for layer in range(num_layers)),
        mamba_heads=mamba_heads,
        mamba_head_size=inner // mamba_heads,
        mamba_groups=raw.get("mamba_n_groups", 1),
        state_size=raw.get("mamba_d_state", 256),
        conv_width=raw.get("mamba_d_conv", 4),
        conv_bias=raw.get("mamba_conv_bias", True),
        chunk_tokens=raw.get("mamba_chunk_size", 256),
        dt_limit=_limits(raw.get("time_step_limit")),
        rope_base=base,
        rotary_dim=rotary_dim,
        tied_embeddings=raw.get("tie_word_embeddings", False),
        rms_eps=raw.get("rms_norm_eps", 1e-5),
        max_model_len=raw.get("max_position_embeddings", 262_144),
    )


def _rope(raw: Mapping[str, Any], head_size: int) -> tuple[float, int]:
    """RoPE base and rotated elements per head; newer configs nest both under ``rope_parameters``."""
    nested = raw.get("rope_parameters") or {}
    base = nested.get("rope_theta", raw.get("rope_theta", 10_000.0))
    factor = nested.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
    return base, int(head_size * factor)


def _limits(raw: Any) -> tuple[float, float]:
    """Bounds of the time step; infinity is written ``Infinity``, or as an object that says so."""
    if raw is None:
        return 0.0, math.inf
    low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in raw)
    return low, high
