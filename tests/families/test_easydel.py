"""Caches of EasyDeL: ragged, split, latent and TurboQuant pages, and recurrent states."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest
from moving import check_moves, paged
from packages import hollow, require

from jaxkv import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayoutHint,
    MambaSpec,
    MLAAttentionSpec,
)

for package in ("easydel", "eformer", "ejkernel", "flax"):
    require(package)

# flax calls what EasyDeL uses by other names now, and jax does away with ``with mesh:``.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

P, S = 7, 16
HINT = LayoutHint(block_axis=0)


@pytest.fixture(scope="module")
def caching():
    """``easydel.caching``; without EASYDEL_AUTO=0 its import changes XLA_FLAGS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYDEL_AUTO", "0")
        with hollow("easydel", "easydel.layers", "easydel.utils"):
            yield importlib.import_module("easydel.caching")


@pytest.fixture(scope="module")
def places(caching):
    """A mesh of one device and what EasyDeL names its axes by."""
    escale = importlib.import_module("eformer.escale")
    axes = ("dp", "fsdp", "ep", "tp", "sp")
    mesh = jax.make_mesh((1,) * 5, axes, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    with mesh:
        yield mesh, escale.PartitionManager(escale.PartitionAxis())


def pages_of(caching, places, kind, **options):
    """The views of a cache of ``easydel.caching.<kind>Cache``, two layers of ``P`` pages of ``S`` tokens."""
    mesh, manager = places
    shared = {"num_hidden_layers": 2, "max_model_length": 64, "page_size": S, "num_pages": P}
    config = getattr(caching, f"{kind}CacheConfig")(**shared | options)
    cache = getattr(caching, f"{kind}Cache")
    return cache.init_cache(mesh=mesh, config=config, partition_manager=manager).views


def check_pages(kv_caches, make_spec):
    leaves = jax.tree.leaves(next(iter(kv_caches.values())))
    spec = make_spec(leaves[0].dtype, sum(leaf.nbytes for leaf in leaves) // P)
    config = KVCacheConfig((KVCacheGroupSpec(tuple(kv_caches), spec, P),))
    check_moves(kv_caches, config, dict.fromkeys(kv_caches, HINT), dict.fromkeys(kv_caches, paged()))


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize(
    ("head_size", "dtype"), [(128, "bf16"), (80, "bf16"), (64, "bf16"), (128, "float8_e4m3fn")]
)
def test_ragged_pages_move(caching, places, version, head_size, dtype):
    views = pages_of(
        caching,
        places,
        "RaggedPages",
        num_kv_heads=3,
        k_headdim=head_size,
        v_headdim=head_size,
        version=version,
        _kvdtype_str=dtype,
    )
    kv_caches = {f"layer.{index}": view.kv_pages for index, view in enumerate(views)}
    check_pages(kv_caches, lambda dtype, stored: FullAttentionSpec(S, 3, head_size, dtype, stored))


def test_split_pages_move(caching, places):
    views = pages_of(caching, places, "UnifiedAttention", num_kv_heads=3, head_dim=80)
    kv_caches = {f"layer.{index}": (view.key_cache, view.value_cache) for index, view in enumerate(views)}
    check_pages(kv_caches, lambda dtype, _: FullAttentionSpec(S, 3, 80, dtype))


def test_latent_pages_move(caching, places):
    views = pages_of(
        caching, places, "MLARaggedPages", num_kv_heads=1, k_headdim=512, v_headdim=64, version="v1"
    )
    kv_caches = {f"layer.{index}": view.kv_pages for index, view in enumerate(views)}
    check_pages(kv_caches, lambda dtype, stored: MLAAttentionSpec(S, 576, dtype, stored))


def test_turboquant_pages_move_with_all_five_leaves(caching, places):
    # More bits only take longer to compute a codebook for.
    quantization = importlib.import_module("easydel.layers.quantization").TurboQuantConfig(bits=2)
    views = pages_of(
        caching,
        places,
        "TurboQuantRaggedPages",
        num_kv_heads=2,
        k_headdim=64,
        v_headdim=64,
        version="v3",
        _kvdtype_str="bf16",
        turboquant_config=quantization,
    )
    names = [
        f"{part}_pages" for part in ("key_indices", "key_signs", "key_norms", "value_indices", "value_norms")
    ]
    kv_caches = {
        f"layer.{index}": {name: getattr(view, name) for name in names} for index, view in enumerate(views)
    }
    check_pages(kv_caches, lambda dtype, stored: FullAttentionSpec(S, 2, 64, jnp.uint8, stored))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "kda"])
def test_recurrent_states_move(caching, kind):
    axes = importlib.import_module("eformer.escale").PartitionAxis()
    shared = {"num_hidden_layers": 1, "partition_axis": axes, "batch_size": 3}
    recurrent, delta = caching.RecurrentCacheConfig, caching.KDACacheConfig
    conv = {"conv_kernel_size": 4, "intermediate_size": 32}
    if kind == "kda":
        sizes = {"key_dim": 32, "value_dim": 32, "d_conv": 4, "recurrent_state_shape": (4, 8, 8)}
        cache = caching.KDACache.init_cache(config=delta.create(**shared, **sizes), dtype=jnp.bfloat16)
    elif kind == "mamba2":
        sizes = {"num_heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 1}
        config = recurrent.create_for_mamba2(**shared, **conv, **sizes)
        cache = caching.RecurrentCache.init_cache(config=config, dtype=jnp.bfloat16)
    else:
        config = recurrent.create_for_mamba(**shared, **conv, ssm_state_size=8)
        cache = caching.RecurrentCache.init_cache(config=config, dtype=jnp.bfloat16)
    names = ["conv_state", "recurrent_state"]
    if kind == "kda":
        names = ["q_conv_state", "k_conv_state", "v_conv_state", "recurrent_state"]
    states = [getattr(cache.views[0], name) for name in names]
    spec = MambaSpec(S, tuple(leaf.shape[1:] for leaf in states), tuple(leaf.dtype for leaf in states))
    config = KVCacheConfig((KVCacheGroupSpec(("state",), spec, 3),))
    check_moves({"state": states}, config, {"state": HINT}, {"state": paged()})
