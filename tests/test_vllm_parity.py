"""Canonical caches of a hybrid model against what vLLM itself makes of it (see the data file's ``meta``)."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, MLAAttentionSpec

VLLM = json.loads(Path(__file__).with_name("data").joinpath("vllm_canonical_hybrid.json").read_text())


def as_layer_spec(described):
    """A spec of vLLM as ours: an attention page is all stored there, and ours alone is padded for Mamba."""
    match described:
        case {"kind": "FullAttentionSpec", "page_size_padded": None, **spec}:
            return FullAttentionSpec(
                spec["block_size"], spec["num_kv_heads"], spec["head_size"], spec["dtype"]
            )
        case {"kind": "MLAAttentionSpec", "num_kv_heads": 1, "page_size_padded": None, **spec}:
            return MLAAttentionSpec(spec["block_size"], spec["head_size"], spec["dtype"])
        case {"kind": "MambaSpec", **spec}:
            shapes = tuple(map(tuple, spec["shapes"]))
            return MambaSpec(spec["block_size"], shapes, tuple(spec["dtypes"]), spec["page_size_padded"])
    raise ValueError(f"no spec of ours for {described}")


@pytest.fixture(scope="module")
def canonical():
    """Canonical form of the model in the data file: layer ``i`` of every group lies in array ``i``."""
    groups = tuple(
        KVCacheGroupSpec(
            tuple(group["layer_names"]), as_layer_spec(group["spec"]), num_blocks=VLLM["num_blocks"]
        )
        for group in VLLM["groups"]
    )
    page_bytes = {group.spec.page_size_padded for group in groups if isinstance(group.spec, MambaSpec)}
    shape = (VLLM["num_blocks"], *page_bytes)
    rows = [jnp.zeros(shape, jnp.uint8) for _ in range(max(len(group.layer_names) for group in groups))]
    kv_caches = {name: row for group in groups for name, row in zip(group.layer_names, rows, strict=False)}
    return canonicalize(kv_caches, KVCacheConfig(groups))


def test_tensors_are_those_of_vllm(canonical):
    ours = [
        {"num_blocks": tensor.num_blocks, "page_size_bytes": tensor.page_size_bytes}
        for tensor in canonical.tensors
    ]
    assert ours == VLLM["tensors"]


def test_each_group_refers_to_the_tensors_and_unpadded_bytes_that_vllm_does(canonical):
    ours = [
        [{"tensor_idx": ref.tensor_idx, "page_size_bytes": ref.page_size_bytes} for ref in refs]
        for refs in canonical.group_data_refs
    ]
    assert ours == VLLM["group_data_refs"]


def test_refs_go_in_the_layer_order_of_their_group(canonical):
    names = [[ref.layer_name for ref in refs] for refs in canonical.group_data_refs]
    assert names == [group["layer_names"] for group in VLLM["groups"]]


def test_a_block_holds_the_bytes_that_vllm_copies_for_it(canonical):
    vllm_bytes = [sum(ref["page_size_bytes"] for ref in refs) for refs in VLLM["group_data_refs"]]
    assert [pages.block_bytes for pages in canonical.groups] == vllm_bytes
