"""``jaxkv bench serve``: what offloading costs and saves in a serving loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from jaxkv.cli.arguments import count
from jaxkv.cli.bench.base import Bench, Verdict
from jaxkv.cli.bench.series import Tell
from jaxkv.cli.bench.serve_measure import Comparison, ServeSettings, measure_serving
from jaxkv.cli.bench.serve_ttft import TtftSettings, compare_ttft, make_prompts
from jaxkv.cli.extras import needs_extra

_EPILOG = """\
Two engines, jaxkv.serving's, do the same work by turns, one with offloading, one without.
  first token   of a prompt that begins with 2,000 tokens of a document and ends with a question, another one
                each time. The device cache is empty: without offloading Gemma 3 270M computes all of it, with
                it the prefix comes from the host pool. Replies are compared
  decode step   of 64 sequences of a stand-in model, one token each; in every step four of them finish a block
                of 288 KiB, which is stored, and an older one is evicted
  prompts       8 at once, 512 tokens and 16 of reply. New ones every time are stored for nothing; the same
                ones again come from the host pool
The stand-in writes its tokens to its caches, which are donated, and spins on one core, so that a decode step
without offloading takes 5 ms, all that the loop around it does included; 512 tokens of a prompt take twice as
long. An accelerator would leave that core to the host; a model on the CPU would leave none.
"""


@final
@dataclass(frozen=True, slots=True)
class ServeFigures:
    """All comparisons."""

    comparisons: tuple[Comparison, ...]


@final
class ServeBench(Bench):
    """Serves with offloading off and on."""

    name = "serve"
    summary = "what offloading costs and saves in a serving loop"
    description = "Serve the same requests with offloading off and on, by turns."
    epilog = _EPILOG
    short = ("--repeats", "7", "--model-repeats", "3")

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Bench``."""
        usual, first = ServeSettings(), TtftSettings()
        parser.add_argument("--no-model", action="store_true", help="leave out Gemma 3 270M")
        for option, number, text in (
            ("--prefix-tokens", first.prefix_tokens, "tokens of the prefix Gemma is given"),
            ("--model-repeats", first.repeats, "rounds with Gemma"),
            ("--step-ms", round(usual.step_s * 1e3), "milliseconds of a decode step"),
            ("--sequences", usual.num_sequences, "sequences that decode"),
            ("--prompts", usual.num_prompts, "prompts at once"),
            ("--prompt-tokens", usual.prompt_tokens, "tokens of each"),
            ("--layers", usual.num_layers, "layers of the stand-in, two at least"),
            ("--repeats", usual.repeats, "rounds with the stand-in"),
        ):
            parser.add_argument(option, type=count, default=number, help=f"{text} (default {number:,})")

    def measure(self, args: argparse.Namespace, tell: Tell) -> ServeFigures:
        """See ``Bench``."""
        settings = ServeSettings(
            args.step_ms * 1e-3, args.sequences, args.prompts, args.prompt_tokens, args.repeats, args.layers
        )
        found = [] if args.no_model else [_measure_model(args, tell)]
        return ServeFigures((*found, *measure_serving(settings, tell)))

    def as_json(self, figures: ServeFigures) -> dict[str, Any]:
        """See ``Bench``. Times in seconds."""
        return {
            "comparisons": [
                {
                    "name": one.name,
                    "measurements": [one.off.as_json(), one.on.as_json()],
                    "times": one.ratio.as_json(),
                }
                for one in figures.comparisons
            ]
        }

    def load_report(self) -> Callable[[ServeFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.serve_report import print_serve  # noqa: PLC0415

        return print_serve

    def load_plot(self) -> Callable[[Path, ServeFigures], None]:
        """See ``Bench``."""
        from jaxkv.cli.bench.serve_plot import save_serve_plot  # noqa: PLC0415

        return save_serve_plot

    def missed(self, figures: ServeFigures) -> Verdict:
        """See ``Bench``."""
        return [
            f"{one.name}: {one.ratio.median:.2f} times as fast, at least {one.at_least:g}"
            for one in figures.comparisons
            if one.at_least is not None and not one.ratio.met
        ]


def _measure_model(args: argparse.Namespace, tell: Tell) -> Comparison:
    with needs_extra("demo", "the model (or give --no-model)"):
        from jaxkv_models.weights import load_model, load_tokenizer  # noqa: PLC0415

        tell("loading Gemma 3 270M")
        model, tokenizer = load_model("gemma3-270m"), load_tokenizer("gemma3-270m")
    settings = TtftSettings(args.prefix_tokens, repeats=args.model_repeats)
    prompts = make_prompts(lambda text: list(tokenizer.encode(text).ids), settings)
    return compare_ttft(model, prompts, settings, tell)
