"""Pages that JAX's own TPU kernel reads, quantized by JAX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import quantization_utils
from moving import check_moves, paged

from jaxkv import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, LayoutHint

H, P, S, D = 2, 7, 4, 8


def test_pages_that_jax_quantized_move_with_their_scales():
    """K and V are ``QuantizedTensor``: two leaves each, int8 ``[H, P, S, D]`` and scales ``[H, P, S, 1]``."""
    values = jnp.array(np.random.default_rng(0).normal(size=(2, H, P, S, D)), jnp.float32)
    layer = {
        name: quantization_utils.QuantizedTensor(*quantization_utils.quantize_to_int8(part))
        for name, part in zip(("k", "v"), values, strict=True)
    }
    scale_bytes = layer["k"].scales.dtype.itemsize
    assert layer["k"].scales.shape == (H, P, S, 1)
    spec = FullAttentionSpec(S, H, D, jnp.int8, page_size_bytes=2 * S * H * (D + scale_bytes))
    config = KVCacheConfig((KVCacheGroupSpec(("layer.0",), spec, P),))
    hints = {"layer.0": LayoutHint(block_axis=1, head_axis=0)}
    check_moves({"layer.0": layer}, config, hints, {"layer.0": paged(axis=1)})
