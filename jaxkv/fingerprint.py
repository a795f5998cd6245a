"""What all chunks of one cache have in common, as a text that hash chains start from."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np

from jaxkv.key_parts import pack
from jaxkv.spec import KVCacheConfig, LayerSpec, page_size_bytes

_NOT_STORED = frozenset({"page_size_padded", "num_speculative_blocks"})


def cache_fingerprint(model_name: str, weights_revision: str, config: KVCacheConfig, layout: str = "") -> str:
    """Names whatever decides what cached bytes mean; equal texts may share chunks.

    That is the model and its weights, the groups in their order with their layers, dtypes and sizes, and
    ``layout``: how the bytes of a chunk are arranged, as ``KVConnectorBase.layout_fingerprint`` or
    ``CanonicalKVCaches.fingerprint`` say it. Block counts and padding, which are not stored, do not matter.
    """
    groups = [
        pack(_describe(group.spec).encode(), *(name.encode() for name in group.layer_names))
        for group in config.groups
    ]
    named = pack(model_name.encode(), weights_revision.encode(), layout.encode(), *groups)
    return hashlib.blake2b(named, digest_size=16, person=b"jaxkv cache").hexdigest()


def _describe(spec: LayerSpec) -> str:
    values = {entry.name: getattr(spec, entry.name) for entry in fields(spec)}
    values["page_size_bytes"] = page_size_bytes(spec)
    stored = [f"{name}={_plain(value)}" for name, value in values.items() if name not in _NOT_STORED]
    return f"{type(spec).__name__}({', '.join(stored)})"


def _plain(value: object) -> object:
    """A value as a text that does not depend on how a dtype or a number was written."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if value is None:
        return None
    return int(value) if isinstance(value, int | np.integer) else np.dtype(value).name  # type: ignore[call-overload]
