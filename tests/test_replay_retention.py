"""Retention: how many distinct prompts a pool can serve to their last block, with it and without."""

from __future__ import annotations

import pytest

from jaxkv.errors import ConfigError
from jaxkv.replay.models import CacheGroups, gemma_like
from jaxkv.replay.retention import Families, serve_families
from jaxkv.spec import FullAttentionSpec, MambaSpec, SlidingWindowSpec

MIB = 1 << 20


def small_gemma() -> CacheGroups:
    """One full layer for five sliding ones, as in Gemma 3, with everything sixteen times shorter."""
    full = FullAttentionSpec(4, 2, 64, "bfloat16")
    sliding = SlidingWindowSpec(4, 2, 64, "bfloat16", sliding_window=64)
    return ((("full",), full), (tuple(f"sliding.{i}" for i in range(5)), sliding))


@pytest.mark.parametrize("branches", [3, 16])
def test_a_pool_with_retention_serves_three_times_as_many_prompts(branches):
    """Prompts of 2,048 tokens that branch at 1,536: 32k and 24k, sixteen times smaller as well."""
    families = Families(
        num_families=48 // branches, branches=branches, prompt_tokens=2048, shared_tokens=1536
    )
    dense, kept = (serve_families(small_gemma(), families, 16 * MIB, interval) for interval in (None, 0))
    assert dense.servable_prompts >= 4
    assert kept.servable_prompts < kept.num_prompts, "the pool was not full"
    assert kept.servable_prompts >= 3 * dense.servable_prompts
    # Who kept its prompts kept where they branch, too.
    assert kept.branch_points >= kept.servable_families >= kept.servable_prompts // branches


@pytest.mark.parametrize("interval", [None, 0, 256])
@pytest.mark.parametrize("device_prompts", [1, 20])
def test_with_room_for_all_every_prompt_end_and_branch_point_is_servable(interval, device_prompts):
    """Also where the device served the shared tokens, so that the host was never asked for them."""
    families = Families(num_families=4, branches=3, prompt_tokens=2048, shared_tokens=1536)
    result = serve_families(small_gemma(), families, 1 << 30, interval, device_prompts=device_prompts)
    assert (result.servable_prompts, result.branch_points) == (12, 4)


@pytest.mark.parametrize("device_prompts", [1, 20])
def test_snapshots_of_a_recurrent_model_are_kept_at_ends_and_branch_points(device_prompts):
    full = FullAttentionSpec(4, 2, 64, "bfloat16")
    state = MambaSpec(64, shapes=((4096,),), dtypes=("float32",))
    groups: CacheGroups = ((("full",), full), (("state",), state))
    families = Families(num_families=4, branches=3, prompt_tokens=2049, shared_tokens=1536)
    dense, kept = (
        serve_families(groups, families, 1 << 30, interval, device_prompts=device_prompts)
        for interval in (None, 0)
    )
    assert (kept.servable_prompts, kept.branch_points) == (12, 4)
    assert kept.stored_bytes < dense.stored_bytes


def test_a_dense_pool_serves_as_many_prompts_as_its_bytes_hold():
    """A block of all layers is 6 MiB; a family of three prompts has 64 shared blocks and 64 of each one."""
    families = Families(num_families=4, branches=3, prompt_tokens=2048, shared_tokens=1024)
    result = serve_families(gemma_like(16), families, 6 * (64 + 3 * 65) << 20, None)
    assert (result.num_prompts, result.servable_prompts) == (12, 3)
    assert (result.servable_families, result.branch_points) == (1, 1)


@pytest.mark.parametrize("wrong", [{"branches": 0}, {"shared_tokens": 2048}])
def test_families_that_share_nothing_or_everything_are_named_errors(wrong):
    with pytest.raises(ConfigError):
        Families(**{"num_families": 1, "branches": 2, "prompt_tokens": 2048, "shared_tokens": 1024, **wrong})
