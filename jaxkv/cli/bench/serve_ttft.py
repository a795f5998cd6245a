"""Times the first token of a prompt whose prefix the host pool holds, and of one that is computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from typing import final

from jaxkv.cli.bench.series import Measurement, Tell
from jaxkv.cli.bench.serve_measure import BLOCK, OFF, ON, Comparison
from jaxkv.cli.workload import Encode
from jaxkv.connector import OffloadingConfig
from jaxkv.serving import EngineConfig, LLMEngine, Model, SamplingParams, build_engine

AT_LEAST = 20.0
_QUESTION = "\n\nQuestion: What does paragraph {} of this license say?\nAnswer:"
_REPLY_TOKENS = 4
_UNCOUNTED_ROUNDS = 2  # One that stores the prefix, one that loads it for the first time.


@final
@dataclass(frozen=True, slots=True)
class TtftSettings:
    """Prompts of one prefix and a question, another one in every round."""

    prefix_tokens: int = 2000
    device_bytes: int = 256 << 20
    host_bytes: int = 512 << 20
    repeats: int = 5


def make_prompts(encode: Encode, settings: TtftSettings) -> list[list[int]]:
    """A prompt for each round, the uncounted ones included: a document cut to size, and a question."""
    text = resources.files("jaxkv.cli").joinpath("documents", "gpl-3.txt").read_text()
    prefix = list(encode(text)[: settings.prefix_tokens])
    rounds = _UNCOUNTED_ROUNDS + settings.repeats
    return [prefix + encode(_QUESTION.format(number))[1:] for number in range(10, 10 + rounds)]


def compare_ttft(
    model: Model, prompts: Sequence[Sequence[int]], settings: TtftSettings, tell: Tell
) -> Comparison:
    """Time to first token of each prompt, with the device cache empty before."""
    longest = max(map(len, prompts)) + _REPLY_TOKENS
    seconds: dict[str, list[float]] = {OFF: [], ON: []}
    with ExitStack() as stack:
        engines = {
            OFF: _make_engine(stack, model, longest, settings, None),
            ON: _make_engine(stack, model, longest, settings, OffloadingConfig(settings.host_bytes)),
        }
        for number, prompt in enumerate(prompts):
            tell(f"first token of a prompt of {len(prompt):,} tokens, {number + 1} of {len(prompts)}")
            replies = set()
            for side, engine in engines.items():
                engine.reset_prefix_cache()
                (output,) = engine.generate([prompt], SamplingParams(_REPLY_TOKENS, ignore_eos=True))
                replies.add(output.output_ids)
                assert output.metrics.ttft_s is not None
                if number >= _UNCOUNTED_ROUNDS:
                    seconds[side].append(output.metrics.ttft_s)
                    hit = output.metrics.host_hit_tokens
                    assert side == OFF or hit > settings.prefix_tokens - BLOCK, f"only {hit} tokens were hit"
            assert len(replies) == 1, f"offloading changed the reply: {replies}"
    off, on = (Measurement(side, tuple(seconds[side])) for side in (OFF, ON))
    return Comparison(f"first token, {settings.prefix_tokens:,}-token prefix", off, on, AT_LEAST)


def _make_engine(
    stack: ExitStack,
    model: Model,
    longest: int,
    settings: TtftSettings,
    offloading: OffloadingConfig | None,
) -> LLMEngine:
    engine = build_engine(
        model,
        device_bytes=settings.device_bytes,
        max_tokens=longest,
        offloading=offloading,
        engine_config=EngineConfig(max_num_seqs=1),
    )
    stack.callback(engine.shutdown)
    return engine
