"""Decode steps of real models that move blocks, as XLA's GPU compiler makes them: no leaf is copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gpu_program import compile_for_h100, h100
from jaxkv_models.bamba import Bamba, BambaConfig
from jaxkv_models.gemma3 import Gemma3, Gemma3Config

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.serving.model import Model, StepBatch
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.transfer import ops

NUM_REQUESTS, NUM_ENTRIES, BLOCK_SIZE = 4, 2, 16
NUM_BLOCKS = (1600, 1200)
"""So many that every leaf is larger than all a step computes."""
BOTH = (GroupId(0), GroupId(1))


def shaped(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gemma3() -> Model:
    """Full attention and sliding windows."""
    config = Gemma3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        is_sliding=(True, False),
        sliding_window=48,
        local_rope_base=1e4,
        global_rope_base=1e6,
        global_rope_factor=1.0,
        query_scale=0.2,
        rms_eps=1e-6,
        max_model_len=512,
    )
    return Gemma3("gemma3", config, weights(config))


def bamba() -> Model:
    """Full attention and Mamba-2 states."""
    config = BambaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        is_mamba=(True, False),
        mamba_heads=8,
        mamba_head_size=32,
        mamba_groups=1,
        state_size=32,
        conv_width=4,
        conv_bias=True,
        chunk_tokens=64,
        dt_limit=(0.0, 1e9),
        rope_base=1e4,
        rotary_dim=16,
        tied_embeddings=True,
        rms_eps=1e-6,
        max_model_len=512,
    )
    return Bamba("bamba", config, weights(config))


def weights(config: Gemma3Config | BambaConfig) -> dict[str, Any]:
    return {name: shaped(*shape, dtype=jnp.float32) for name, shape in config.tensor_shapes().items()}


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    h100()


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 16) as opened:
        yield opened


@pytest.fixture(params=[gemma3, bamba])
def model(request: pytest.FixtureRequest) -> Model:
    made: Model = request.param()
    return made


def decode_batch(model: Model) -> StepBatch:
    tables = tuple(
        shaped(NUM_REQUESTS, 2 if isinstance(spec, MambaSpec) else 512 // BLOCK_SIZE)
        for _, spec in model.cache_groups(BLOCK_SIZE, jnp.bfloat16)
    )
    return StepBatch(shaped(NUM_REQUESTS, 1), shaped(NUM_REQUESTS), shaped(NUM_REQUESTS), tables)


def make_caches(model: Model) -> tuple[dict[str, Any], CanonicalKVCaches]:
    groups = model.cache_groups(BLOCK_SIZE, jnp.bfloat16)
    sized = zip(groups, NUM_BLOCKS, strict=True)
    config = KVCacheConfig(tuple(KVCacheGroupSpec(names, spec, number) for (names, spec), number in sized))
    caches = model.init_caches(config)
    return caches, canonicalize(caches, config)


def test_a_decode_step_that_restores_before_and_offloads_after_copies_no_leaf(
    model: Model, pool: HostPool
) -> None:
    caches, canonical = make_caches(model)

    def step(params: Any, caches: Any, token: Any, batch: StepBatch, ids: Any, addresses: Any) -> Any:
        statuses = []

        def move(op: Any) -> None:
            nonlocal token, caches
            for group in BOTH:
                leaves, pages = canonical.group_leaves(caches, group), canonical.groups[group]
                token, status, leaves = op(pool, token, leaves, ids, addresses, pages)
                caches = canonical.replace(caches, group, leaves)
                statuses.append(status)

        move(ops.restore)
        logits, caches = model.step(params, caches, batch)
        move(ops.offload)
        return caches, token, logits, statuses

    numbers = shaped(NUM_ENTRIES)
    arguments = model.params, caches, pool.token(), decode_batch(model), numbers, numbers
    program = compile_for_h100(step, *arguments, donated=(1, 2))
    sizes = [leaf.nbytes for leaf in canonical.leaves(caches)]
    assert program.aliased_bytes == sum(sizes) + pool.token().nbytes
    assert program.new_arrays(min(sizes)) == []
    assert program.temporary_bytes < min(sizes)
    aliases = sorted(len(pages.leaves) + 1 for pages in canonical.groups)
    assert (
        sorted(program.aliases_of("jaxkv_restore")) == sorted(program.aliases_of("jaxkv_offload")) == aliases
    )


def test_a_decode_step_that_scatters_before_and_gathers_after_copies_no_leaf(
    model: Model, pool: HostPool
) -> None:
    caches, canonical = make_caches(model)

    def step(params: Any, caches: Any, batch: StepBatch, ids: Any, staging: Any) -> Any:
        for group in BOTH:
            leaves, pages = canonical.group_leaves(caches, group), canonical.groups[group]
            leaves, _ = ops.scatter_pages(staging[group], ids, leaves, pages)
            caches = canonical.replace(caches, group, leaves)
        logits, caches = model.step(params, caches, batch)
        gathered = [
            ops.gather_pages(canonical.group_leaves(caches, group), ids, canonical.groups[group])
            for group in BOTH
        ]
        return caches, logits, gathered

    staging = [shaped(NUM_ENTRIES, pages.record_bytes, dtype=jnp.uint8) for pages in canonical.groups]
    arguments = model.params, caches, decode_batch(model), shaped(NUM_ENTRIES), staging
    program = compile_for_h100(step, *arguments, donated=(1,))
    sizes = [leaf.nbytes for leaf in canonical.leaves(caches)]
    assert program.aliased_bytes == sum(sizes)
    assert program.new_arrays(min(sizes)) == []
    assert program.temporary_bytes < min(sizes)
    assert sorted(program.aliases_of("jaxkv_scatter_pages")) == sorted(
        len(pages.leaves) for pages in canonical.groups
    )
    assert program.aliases_of("jaxkv_gather_pages") == [0] * len(BOTH)
