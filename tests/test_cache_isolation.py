"""Served end to end, another model, weights, dtype, layout, tenant, salt, adapter or image never hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from dict_backend import DictManager, DictWorker
from toy_model import VOCAB, ToyModel, embedding, make_config, oracle_tokens, random_prompt, share_programs

from jaxkv import BlockTransfer, HostPool, OffloadingConfig, OffloadingConnector, canonicalize
from jaxkv.errors import ConfigError, RequestError
from jaxkv.key_parts import CacheKeyParts, MultiModalInput, PromptEmbeddings
from jaxkv.offload import OffloadingSpec
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams
from jaxkv.testing.leaks import assert_no_leaks

KINDS = ("full", "window")
PROMPT = random_prompt(1, 41)
HIT = 40
NEW = 3


class KeptSpec(OffloadingSpec):
    """Chunks outlive the connector, as they do in a tier that several engines share."""

    def __init__(self, kept, config, blocks_per_chunk=1):
        self.kept, self.config, self.blocks_per_chunk = kept, config, blocks_per_chunk
        self.staging = HostPool(1 << 20)

    def get_manager(self):
        return self.kept.manager

    def get_worker(self, kv_caches):
        canonical = canonicalize(kv_caches, self.config)
        return DictWorker(BlockTransfer(canonical, self.staging, self.blocks_per_chunk), self.kept.data)

    def shutdown(self):
        self.staging.close()


class Kept:
    def __init__(self):
        self.data = {}
        self.manager = DictManager(1 << 20, (1, 1), self.data)


@dataclass(frozen=True)
class DressedToy(ToyModel):
    """The toy model with caches of another shape or dtype; what it computes is the same."""

    dtype: str = "uint32"
    dress: Callable = lambda leaf: leaf
    undress: Callable = lambda leaf: leaf

    def cache_groups(self, block_size, dtype=None):
        return super().cache_groups(block_size, self.dtype)

    def init_caches(self, config):
        return jax.tree.map(self.dress, super().init_caches(config))

    def step(self, params, kv_caches, batch):
        logits, caches = super().step(params, jax.tree.map(self.undress, kv_caches), batch)
        return logits, jax.tree.map(self.dress, caches)


def to_signed(leaf):
    return jax.lax.bitcast_convert_type(leaf, jnp.int32)


def to_unsigned(leaf):
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def values_inside(leaf):
    return jnp.moveaxis(leaf, 0, -1) if leaf.ndim == 3 else leaf


def values_outside(leaf):
    return jnp.moveaxis(leaf, -1, 0) if leaf.ndim == 3 else leaf


PLAIN = ToyModel(kinds=KINDS)


def make_engine(model=PLAIN, kept=None, *, blocks_per_chunk=1, **options):
    config = make_config(model, 4, full=31, window=14)
    offloading = OffloadingConfig("1MiB", blocks_per_chunk=blocks_per_chunk)
    spec = None if kept is None else KeptSpec(kept, config, blocks_per_chunk)
    connector = OffloadingConnector(offloading, config, spec=spec)
    engine_config = EngineConfig(prefill_shapes=(48,), max_num_seqs=1, **options)
    return share_programs(LLMEngine(model, config, engine_config, connector))


def serve(engine, key_parts=None, prompt=PROMPT, params=None, **options):
    """Tokens found on the device and in host memory."""
    params = SamplingParams(NEW) if params is None else params
    request_id = engine.add_request(prompt, params, key_parts=key_parts, **options)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    engine.flush()
    outputs += engine.step()
    (output,) = [output for output in outputs if output.request_id == request_id]
    assert output.output_ids == oracle_tokens(prompt, params.max_new_tokens, KINDS)
    return output.metrics.device_hit_tokens, output.metrics.host_hit_tokens


def close(engine):
    assert_no_leaks(engine.connector)
    engine.shutdown()


OTHER_ENGINES = {
    "model": (ToyModel(kinds=KINDS, name="other"), {}),
    "weights revision": (PLAIN, {"weights_revision": "2"}),
    "tenant": (PLAIN, {"salt": "other"}),
    "hash": (PLAIN, {"hash_name": "blake2b-256"}),
    "chunk size": (PLAIN, {"blocks_per_chunk": 2}),
    "dtype": (DressedToy(kinds=KINDS, dtype="int32", dress=to_signed, undress=to_unsigned), {}),
    "layout": (DressedToy(kinds=KINDS, dress=values_inside, undress=values_outside), {}),
}


@pytest.mark.parametrize("name", OTHER_ENGINES)
def test_chunks_of_another_engine_are_found_only_if_it_is_alike_in(name):
    other, options = OTHER_ENGINES[name]
    kept = Kept()
    first = make_engine(kept=kept)
    assert serve(first) == (0, 0)
    close(first)
    second = make_engine(other, kept, **options)
    assert serve(second) == (0, 0)
    close(second)
    third = make_engine(kept=kept)
    assert serve(third) == (0, HIT)
    close(third)


OTHER_REQUESTS = {
    "nothing": None,
    "salt": CacheKeyParts(cache_salt="s"),
    "another salt": CacheKeyParts(cache_salt="t"),
    "adapter": CacheKeyParts(lora_name="s"),
    "adapter revision": CacheKeyParts(lora_name="s", lora_revision="2"),
    "image": CacheKeyParts(inputs=(MultiModalInput("cat", 1, 2),)),
    "another image": CacheKeyParts(inputs=(MultiModalInput("dog", 1, 2),)),
    "image elsewhere": CacheKeyParts(inputs=(MultiModalInput("cat", 2, 2),)),
    "embeddings": CacheKeyParts(embeddings=(PromptEmbeddings(1, (b"cat",)),)),
    "other embeddings": CacheKeyParts(embeddings=(PromptEmbeddings(1, (b"dog",)),)),
}


@pytest.fixture(scope="module")
def busy_engine():
    """One that has served the prompt for each of ``OTHER_REQUESTS``, in turn."""
    engine = make_engine()
    found = {name: serve(engine, key_parts) for name, key_parts in OTHER_REQUESTS.items()}
    assert found == dict.fromkeys(OTHER_REQUESTS, (0, 0))
    yield engine
    close(engine)


@pytest.mark.parametrize("name", OTHER_REQUESTS)
def test_a_request_finds_its_own_again_and_no_other_found_it(busy_engine, name):
    busy_engine.reset_prefix_cache()
    assert serve(busy_engine, OTHER_REQUESTS[name]) == (0, HIT)
    assert serve(busy_engine, OTHER_REQUESTS[name]) == (HIT, 0)


def test_what_comes_before_an_image_is_shared():
    engine = make_engine()
    serve(engine, CacheKeyParts(inputs=(MultiModalInput("cat", 22, 5),)))
    dog = CacheKeyParts(inputs=(MultiModalInput("dog", 22, 5),))
    assert serve(engine, dog) == (20, 0)
    engine.reset_prefix_cache()
    assert serve(engine, dog) == (0, HIT)
    close(engine)


def test_a_request_that_skips_reading_computes_all_and_stores_it():
    engine = make_engine()
    skip = SamplingParams(NEW, skip_reading_prefix_cache=True)
    assert serve(engine, params=skip) == (0, 0)
    assert serve(engine, params=skip) == (0, 0)
    assert engine.connector.get_stats().queried_tokens == 0
    assert serve(engine) == (HIT, 0)
    assert engine.connector.get_stats().queried_tokens == len(PROMPT) - HIT
    engine.reset_prefix_cache()
    assert serve(engine, params=skip) == (0, 0)
    engine.reset_prefix_cache()
    assert serve(engine) == (0, HIT)
    close(engine)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"max_load_tokens": 10}, (0, 8)),
        ({"max_load_tokens": 0}, (0, 0)),
        ({"kv_load_tiers": []}, (0, 0)),
        ({"kv_load_tiers": ["disk"]}, (0, 0)),
        ({"kv_load_tiers": [{"medium": "CPU"}]}, (0, HIT)),
    ],
    ids=str,
)
def test_a_request_loads_no_more_than_it_asks_for(params, found):
    engine = make_engine()
    serve(engine)
    engine.reset_prefix_cache()
    assert serve(engine, kv_transfer_params=params) == found
    close(engine)


def test_a_request_stores_no_more_than_it_asks_for():
    engine = make_engine()
    serve(engine, kv_transfer_params={"max_offload_tokens": 15})
    engine.reset_prefix_cache()
    assert serve(engine) == (0, 12)
    close(engine)


def test_longer_hashes_serve_the_host_backend_too():
    engine = make_engine(hash_name="blake2b-256")
    serve(engine)
    engine.reset_prefix_cache()
    assert serve(engine) == (0, HIT)
    close(engine)


WEIGHTS = [embedding()]


@dataclass(frozen=True)
class TrainedToy(ToyModel):
    """Its weights are whatever training left in ``WEIGHTS``."""

    @property
    def params(self):
        return {"embed": jnp.asarray(WEIGHTS[-1])}


def tokens_of(engine):
    (output,) = engine.generate([PROMPT], SamplingParams(NEW))
    return output.output_ids, output.metrics.device_hit_tokens + output.metrics.host_hit_tokens


def test_changed_weights_find_nothing_and_former_ones_find_theirs_again():
    engine = make_engine(TrainedToy(kinds=KINDS), weights_revision="1")
    before, _ = tokens_of(engine)
    WEIGHTS.append(embedding()[::-1].copy())
    engine.set_weights_revision("2")
    changed, hit = tokens_of(engine)
    assert hit == 0
    fresh = make_engine(TrainedToy(kinds=KINDS))
    assert changed == tokens_of(fresh)[0] != before
    close(fresh)
    assert tokens_of(engine) == (changed, HIT)
    WEIGHTS.pop()
    engine.set_weights_revision("1")
    assert tokens_of(engine) == (before, HIT)
    close(engine)


def test_weights_cannot_change_under_a_running_request_or_keep_their_name():
    engine = make_engine(weights_revision="1")
    engine.add_request(PROMPT, SamplingParams(NEW), "r")
    engine.step()
    with pytest.raises(RequestError, match=r"\['r'\].*abort"):
        engine.set_weights_revision("2")
    engine.abort_all()
    with pytest.raises(ConfigError, match="'1' already"):
        engine.set_weights_revision("1")
    engine.set_weights_revision("2")
    assert serve(engine) == (0, 0)
    close(engine)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"key_parts": CacheKeyParts(inputs=(MultiModalInput("cat", 40, 2),))}, "token 42.*41 tokens"),
        ({"kv_transfer_params": {"max_load_tokens": -1}}, "max_load_tokens.*-1"),
    ],
    ids=["parts", "params"],
)
def test_a_request_that_means_nothing_is_refused_and_leaves_nothing(options, named):
    engine = make_engine()
    with pytest.raises(RequestError, match=named):
        engine.add_request(PROMPT, SamplingParams(NEW), "r", **options)
    assert not engine.has_unfinished_requests
    assert serve(engine, request_id="r") == (0, 0)
    close(engine)


@pytest.mark.parametrize("prompt", [[1.5], [[1]], ["a"]], ids=repr)
def test_a_prompt_of_no_whole_numbers_is_refused(prompt):
    engine = make_engine()
    with pytest.raises(RequestError, match="whole numbers"):
        engine.add_request(prompt)
    with pytest.raises(RequestError, match=rf"\[0, {VOCAB}\)"):
        engine.add_request([2**40])
    close(engine)
