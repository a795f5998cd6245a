"""Gemma 3 configs and weight names, from GGUF metadata and from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxkv.errors import WeightsError
from jaxkv_models.arrays import HostTensor, check_shape, load_tensors
from jaxkv_models.gemma3 import Gemma3, Gemma3Config
from jaxkv_models.gguf_file import GGUFFile
from jaxkv_models.hf_directory import HFDirectory, require

_SLIDING_PATTERN = 6
"""One full-attention layer in six where the file does not say; GGUF files never do."""
_LOCAL_ROPE_BASE = 10_000.0
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def load_gguf(file: GGUFFile, name: str) -> Gemma3:
    """The model in ``file``, dequantized to float32. Norm weights in GGUF files include Gemma's ``1 +``."""
    config = _gguf_config(file)

    def read(tensor: str) -> HostTensor:
        return file.read(_gguf_name(tensor))

    for tensor, shape in config.tensor_shapes().items():
        info = file.tensors.get(_gguf_name(tensor))
        if info is not None:
            check_shape(f"{_gguf_name(tensor)!r} of {file.path}", info.shape, shape)
    return Gemma3(name, config, load_tensors(config.tensor_shapes(), read))


def _gguf_name(tensor: str) -> str:
    if tensor == "embed_tokens.weight":
        return "token_embd.weight"
    if tensor == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = tensor.split(".", 2)
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _gguf_config(file: GGUFFile) -> Gemma3Config:
    def value(key: str, default: Any = None) -> Any:
        found = file.metadata.get(f"gemma3.{key}", default)
        if found is None:
            raise WeightsError(f"{file.path} lacks the metadata key 'gemma3.{key}'; convert the model again")
        return found

    head_size, num_layers = value("attention.key_length"), value("block_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightsError(f"{file.path} has no tensor 'token_embd.weight'; use a complete GGUF file")
    hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
    # The 27B model alone scales queries by hidden size over heads; GGUF files do not say so.
    scalar = hidden_size / num_heads if num_layers == 62 else head_size
    return Gemma3Config(
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=value("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv"),
        head_size=head_size,
        is_sliding=_pattern(num_layers, value("attention.sliding_window_pattern", _SLIDING_PATTERN)),
        sliding_window=value("attention.sliding_window"),
        local_rope_base=value("rope.freq_base_swa", _LOCAL_ROPE_BASE),
        global_rope_base=value("rope.freq_base"),
        global_rope_factor=value("rope.scaling.factor", 1.0),
        query_scale=1.0 / math.sqrt(scalar),
        rms_eps=value("attention.layer_norm_rms_epsilon"),
        max_model_len=value("context_length"),
    )


def _pattern(num_layers: int, period: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % period != 0 for layer in range(num_layers))


def load_hf(directory: HFDirectory, name: str) -> Gemma3:
    """The text decoder of a ``gemma3`` or ``gemma3_text`` directory."""
    config = _hf_config(directory.config.get("text_config", directory.config), directory)
    weights = directory.weights(("model.", "language_model.model.", "model.language_model."))

    def read(tensor: str) -> HostTensor:
        array = weights.read(tensor, config.tensor_shapes()[tensor])
        if tensor.endswith("norm.weight"):
            array += 1.0  # stored around zero
        return array

    return Gemma3(name, config, load_tensors(config.tensor_shapes(), read))


def _hf_config(raw: Mapping[str, Any], directory: HFDirectory) -> Gemma3Config:
    where = directory.path
    if raw.get("final_logit_softcapping") or raw.get("attn_logit_softcapping"):
        raise WeightsError(
            f"{where / 'config.json'} asks for soft-capping, which this model file does not know"
        )
    num_layers = require(raw, "num_hidden_layers", where)
    is_sliding = _pattern(num_layers, raw.get("sliding_window_pattern") or _SLIDING_PATTERN)
    if raw.get("layer_types"):
        is_sliding = tuple(kind == "sliding_attention" for kind in raw["layer_types"])
    # Newer configs nest RoPE settings by layer kind, older ones spread them over the top level.
    rope = raw.get("rope_parameters") or {}
    full = rope.get("full_attention") or {
        "rope_theta": raw.get("rope_theta", 1_000_000.0),
        **(raw.get("rope_scaling") or {}),
    }
    local = rope.get("sliding_attention") or {"rope_theta": raw.get("rope_local_base_freq", _LOCAL_ROPE_BASE)}
    head_size = raw.get("head_dim", 256)
    return Gemma3Config(
        vocab_size=raw.get("vocab_size", 262_208),
        hidden_size=require(raw, "hidden_size", where),
        intermediate_size=require(raw, "intermediate_size", where),
        num_heads=raw.get("num_attention_heads", 8),
        num_kv_heads=raw.get("num_key_value_heads", 4),
        head_size=head_size,
        is_sliding=is_sliding,
        sliding_window=raw.get("sliding_window", 4096),
        local_rope_base=local["rope_theta"],
        global_rope_base=full["rope_theta"],
        global_rope_factor=full.get("factor", 1.0),
        query_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        max_model_len=raw.get("max_position_embeddings", 131_072),
    )
