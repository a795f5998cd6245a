"""Times a serving loop with offloading off and on, by turns. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import final

import jax.numpy as jnp
import numpy as np

from jaxkv.cli.bench.series import Contender, Measurement, Ratio, Tell, interleave, undisturbed
from jaxkv.cli.bench.serve_model import LAYERS, StandInModel, seconds_per_spin
from jaxkv.connector import OffloadingConfig
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams, build_engine
from jaxkv.spec import page_size_bytes

BLOCK = 16
OFF, ON = "off", "on"
_DECODE_AT_LEAST = 0.98
_REPLY_TOKENS = 16
_PREFILL_SHAPES = (64, 512)

Prompts = Sequence[Sequence[int]]


@final
@dataclass(frozen=True, slots=True)
class ServeSettings:
    """``repeats`` rounds of each comparison. A round of decoding is as many steps as a block has tokens, so
    that every sequence finishes a block in it."""

    step_s: float = 5e-3
    num_sequences: int = 64
    num_prompts: int = 8
    prompt_tokens: int = 512
    repeats: int = 15
    num_layers: int = LAYERS


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of the same work with offloading off and on, one number each a round."""

    name: str
    off: Measurement
    on: Measurement
    at_least: float | None = None

    @property
    def ratio(self) -> Ratio:
        """How many times faster it was with offloading on."""
        pairs = zip(self.off.seconds, self.on.seconds, strict=True)
        return Ratio(self.name, tuple(off / on for off, on in pairs), self.at_least)


@final
class EnginePair:
    """An engine without offloading and one with, of the same stand-in model.

    ``host_blocks`` fit the pool; at most ``moved_blocks`` of them come or go in one step.
    """

    def __init__(
        self, model: StandInModel, num_seqs: int, max_tokens: int, *, host_blocks: int, moved_blocks: int
    ) -> None:
        groups = model.cache_groups(BLOCK, jnp.float32)
        block_bytes = sum(len(names) * page_size_bytes(spec) for names, spec in groups)
        smallest, *larger = _PREFILL_SHAPES
        shapes = (smallest, *(shape for shape in larger if shape <= max_tokens))
        config = EngineConfig(max_num_seqs=num_seqs, prefill_shapes=shapes, prefill_budget=1 << 16)
        with ExitStack() as stack:
            engines = []
            for offloading in (None, OffloadingConfig(host_blocks * block_bytes, offload_prompt_only=False)):
                engine = build_engine(
                    model,
                    device_bytes=num_seqs * (max_tokens // BLOCK + 2) * block_bytes,
                    max_tokens=max_tokens,
                    offloading=offloading,
                    engine_config=config,
                )
                stack.callback(engine.shutdown)
                engine.kv_caches = dict(engine.connector.warm_up(engine.kv_caches, moved_blocks))
                engines.append(engine)
            self.off, self.on = engines
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Shut both down."""
        self._stack.close()

    def compare(
        self, name: str, work: Callable[[LLMEngine], Callable[[], object]], repeats: int
    ) -> Comparison:
        """Time what ``work`` makes for each engine. Before, the device forgets what no request holds."""
        contenders = [
            Contender(side, work(engine), engine.reset_prefix_cache)
            for side, engine in ((OFF, self.off), (ON, self.on))
        ]
        with undisturbed():
            seconds = interleave(contenders, repeats)
        return Comparison(name, Measurement(OFF, seconds[OFF]), Measurement(ON, seconds[ON]))


def measure_serving(settings: ServeSettings, tell: Tell) -> list[Comparison]:
    """Decoding, prompts that never come back, and prompts that do."""
    tell("calibrating the stand-in for a device step")
    spin_s = seconds_per_spin()
    return [_compare_decode(settings, spin_s, tell), *_compare_prompts(settings, spin_s, tell)]


def _compare_decode(settings: ServeSettings, spin_s: float, tell: Tell) -> Comparison:
    """Steps of one token for every sequence, while every block that one finishes is stored."""
    number = settings.num_sequences
    tell(f"decoding {number} sequences")
    longest = (settings.repeats + 6) * BLOCK
    model = StandInModel(num_layers=settings.num_layers)
    pair = EnginePair(model, number, longest, host_blocks=8 * number, moved_blocks=2 * number)
    with closing(pair):
        for engine in (pair.off, pair.on):
            for index in range(number):  # A sixteenth of them finishes a block in each step.
                params = SamplingParams(max_new_tokens=longest - 2 * BLOCK, ignore_eos=True)
                engine.add_request([index % 256] * (BLOCK + index % BLOCK), params)
            _run_steps(engine)
        _run_steps(pair.on)
        for _ in range(2):  # The second time with what the loop does while the step runs.
            lacking_s = settings.step_s - median(_run_steps(pair.off))
            model.spins = max(0, model.spins + round(lacking_s / spin_s))
        before = _stored(pair.on)
        found = pair.compare("", lambda engine: lambda: _run_steps(engine), settings.repeats)
        stored, wanted = _stored(pair.on) - before, number * settings.repeats
        assert stored >= wanted, f"{stored} blocks were stored, {wanted} were finished"
    off, on = (
        Measurement(one.name, tuple(seconds / BLOCK for seconds in one.seconds))
        for one in (found.off, found.on)
    )
    return Comparison(f"decode step of {number}, stored", off, on, _DECODE_AT_LEAST)


def _compare_prompts(settings: ServeSettings, spin_s: float, tell: Tell) -> Iterator[Comparison]:
    """Batches of prompts from the first to the last token: new ones every time, then the same ones."""
    name = f"{settings.num_prompts} prompts of {settings.prompt_tokens}"
    longest = settings.prompt_tokens + _REPLY_TOKENS
    blocks = settings.num_prompts * (longest // BLOCK + 1)
    model = StandInModel(num_layers=settings.num_layers)
    pair = EnginePair(model, settings.num_prompts, longest, host_blocks=blocks * 3 // 2, moved_blocks=blocks)
    with closing(pair):
        tell(f"{name}: compiling")
        for engine in (pair.off, pair.on):  # How many rows decode at once depends on when loads arrive.
            engine.warmup()
        model.spins = round(settings.step_s / spin_s)
        tell(f"{name}: new ones every time")

        def serve_new(engine: LLMEngine) -> Callable[[], object]:
            draw = np.random.default_rng(0)
            return lambda: _serve(engine, _make_prompts(settings, draw))

        yield pair.compare(f"{name}, new ones", serve_new, settings.repeats)
        tell(f"{name}: the same ones again")
        prompts = _make_prompts(settings, np.random.default_rng(1))
        _serve(pair.on, prompts)
        yield pair.compare(f"{name}, again", lambda one: lambda: _serve(one, prompts), settings.repeats)
        loaded = pair.on.connector.get_stats().groups[0].loaded_chunks
        wanted = settings.repeats * settings.num_prompts * (settings.prompt_tokens // BLOCK - 1)
        assert loaded >= wanted, f"{loaded} blocks were loaded, at least {wanted} were there"


def _run_steps(engine: LLMEngine) -> list[float]:
    """As many steps as a block has tokens; seconds of each."""
    seconds = []
    for _ in range(BLOCK):
        start = perf_counter()
        engine.step()
        seconds.append(perf_counter() - start)
    return seconds


def _serve(engine: LLMEngine, prompts: Prompts) -> None:
    engine.generate(prompts, SamplingParams(max_new_tokens=_REPLY_TOKENS, ignore_eos=True))


def _make_prompts(settings: ServeSettings, draw: np.random.Generator) -> Prompts:
    tokens: list[list[int]] = draw.integers(0, 256, (settings.num_prompts, settings.prompt_tokens)).tolist()
    return tokens


def _stored(engine: LLMEngine) -> int:
    stored: int = engine.connector.get_stats().groups[0].stored_chunks
    return stored
