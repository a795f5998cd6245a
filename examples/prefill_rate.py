"""How near prefill of a Gemma 3 model comes to plain matrix products, and how much a host hit shortens TTFT.

    python examples/prefill_rate.py --model gemma3-270m --tokens 1406

Every round measures three things, one after the other, so that a busy machine slows all alike: the jitted
matrix products with all weights, for the chunks the engine would compute; the engine's prefill with nothing
cached; and the engine with the prompt in the host pool only. Times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxkv_models.gemma3 import Gemma3
from jaxkv_models.weights import load_model

from jaxkv import JaxKVError, OffloadingConfig, RequestError
from jaxkv.serving import DEFAULT_PREFILL_SHAPES, EngineConfig, LLMEngine, SamplingParams, build_engine
from jaxkv.serving.build import DEFAULT_BLOCK_SIZE
from jaxkv.serving.chunking import ChunkRules, chunk_choices

_DEVICE_BYTES, _HOST_BYTES = 2**28, 2**30


@final
class PlainProducts:
    """The matrix products a forward pass cannot do without: one jitted program a chunk, nothing in between.

    All linear layers for every token, the unembedding for the last one.
    """

    def __init__(self, model: Gemma3, chunks: Sequence[int]) -> None:
        embedding = model.params["embed_tokens.weight"]
        linear = [w for w in model.params.values() if w.ndim == 2 and w is not embedding]
        self.num_flops = 2 * (sum(chunks) * sum(w.size for w in linear) + embedding.size)
        # One call for all weights was 8 % faster on two cores than one call for each.
        self._products = jax.jit(lambda inputs, weights: [inputs[w.shape[1]] @ w.T for w in weights])
        self._calls = [(_inputs(rows, linear), linear) for rows in chunks]
        self._calls.append((_inputs(1, [embedding]), [embedding]))

    def run(self) -> float:
        """Compute all of them; seconds."""
        start = time.perf_counter()
        for inputs, weights in self._calls:
            jax.block_until_ready(self._products(inputs, weights))  # type: ignore[no-untyped-call]
        return time.perf_counter() - start


def _inputs(rows: int, weights: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """A (rows, in) array for every width the (out, in) ``weights`` take."""
    return {w.shape[1]: jnp.ones((rows, w.shape[1])) for w in weights}


def attention_flops(model: Gemma3, num_tokens: int) -> int:
    """Floating-point operations of the scores and the weighted sums, visible pairs of tokens only."""
    config = model.config
    seen = np.arange(1, num_tokens + 1)
    pairs = sum(
        int(np.minimum(seen, config.sliding_window).sum() if is_sliding else seen.sum())
        for is_sliding in config.is_sliding
    )
    return 4 * config.num_heads * config.head_size * pairs


def chunk_sizes(num_tokens: int) -> list[int]:
    """New tokens of each step in which the engine prefills a prompt."""
    rules = ChunkRules(DEFAULT_PREFILL_SHAPES, DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE, stop_at_blocks=False)
    sizes: list[int] = []
    while (start := sum(sizes)) < num_tokens:
        sizes.append(next(chunk_choices(rules, start, num_tokens, DEFAULT_PREFILL_SHAPES[-1])).num_new)
    return sizes


def make_engine(model: Gemma3, num_tokens: int, offloading: OffloadingConfig | None) -> LLMEngine:
    """A compiled engine for one prompt of ``num_tokens`` at a time."""
    engine = build_engine(
        model,
        device_bytes=_DEVICE_BYTES,
        max_tokens=num_tokens + 1,
        offloading=offloading,
        engine_config=EngineConfig(max_num_seqs=1),
    )
    engine.warmup()
    return engine


@final
@dataclass(frozen=True, slots=True)
class FirstToken:
    """How one request got its first token."""

    ttft_s: float
    computed_tokens: int
    token: int


def first_token(engine: LLMEngine, prompt: Sequence[int]) -> FirstToken:
    """Serve ``prompt`` with nothing of it in the device cache."""
    engine.reset_prefix_cache()
    (output,) = engine.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
    ttft_s = output.metrics.ttft_s
    assert ttft_s is not None, "a finished request has a first token"
    return FirstToken(ttft_s, output.metrics.computed_tokens, output.output_ids[0])


def measure(model: Gemma3, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """The three times of every round and what follows from their medians."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(2, model.vocab_size, num_tokens)]
    chunks = chunk_sizes(num_tokens)
    plain = PlainProducts(model, chunks)
    computing = make_engine(model, num_tokens, None)
    restoring = make_engine(model, num_tokens, OffloadingConfig(host_bytes=_HOST_BYTES))
    times: dict[str, list[float]] = {"plain_s": [], "recompute_ttft_s": [], "restore_ttft_s": []}
    try:
        for engine in (computing, restoring):  # The second fills the host pool.
            first_token(engine, prompt)
        plain.run()
        for _ in range(num_rounds):
            times["plain_s"].append(plain.run())
            recomputed = first_token(computing, prompt)
            times["recompute_ttft_s"].append(recomputed.ttft_s)
            restored = first_token(restoring, prompt)
            times["restore_ttft_s"].append(restored.ttft_s)
            assert recomputed.computed_tokens == num_tokens, recomputed
            assert recomputed.token == restored.token, (recomputed, restored)
    finally:
        computing.shutdown()
        restoring.shutdown()
    plain_s, recompute_s, restore_s = (median(values) for values in times.values())
    with_attention = plain.num_flops + attention_flops(model, num_tokens)
    return {
        "prompt_tokens": num_tokens,
        "chunks": chunks,
        "plain_gflops_per_s": plain.num_flops / plain_s / 1e9,
        "prefill_gflops_per_s": plain.num_flops / recompute_s / 1e9,
        "prefill_with_attention_gflops_per_s": with_attention / recompute_s / 1e9,
        "prefill_to_plain": plain_s / recompute_s,
        "prefill_with_attention_to_plain": with_attention / plain.num_flops * plain_s / recompute_s,
        "computed_tokens_after_restore": restored.computed_tokens,
        "recompute_to_restore_ttft": recompute_s / restore_s,
        "rounds": times,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu_info = Path("/proc/cpuinfo")
    names = (
        [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        if cpu_info.is_file()
        else []
    )
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
    }


def report(result: dict[str, Any]) -> str:
    """The result for people."""

    def times(name: str) -> str:
        values = result["rounds"][name]
        return f"{median(values):7.3f} s  ({min(values):.3f} to {max(values):.3f})"

    return "\n".join(
        (
            ", ".join(f"{key} {value}" for key, value in result["machine"].items()),
            f"{result['model']}, {result['prompt_tokens']} tokens in chunks of {result['chunks']}, "
            f"median of {len(result['rounds']['plain_s'])} rounds (lowest to highest)",
            f"plain products   {times('plain_s')}  {result['plain_gflops_per_s']:6.1f} GFLOP/s",
            f"prefill, TTFT    {times('recompute_ttft_s')}  {result['prefill_gflops_per_s']:6.1f} GFLOP/s "
            f"= {result['prefill_to_plain']:.2f} of plain",
            f"  attention counted too {result['prefill_with_attention_gflops_per_s']:26.1f} GFLOP/s "
            f"= {result['prefill_with_attention_to_plain']:.2f} of plain",
            f"host pool, TTFT  {times('restore_ttft_s')}  {result['recompute_to_restore_ttft']:.1f} times "
            f"shorter, {result['computed_tokens_after_restore']} tokens computed",
        )
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--help`` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", default="gemma3-270m", help="gemma3-270m, a .gguf file or a directory of a Gemma 3 model"
    )
    parser.add_argument("--tokens", type=int, default=1406, help="length of the prompt (default: 1406)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind (default: 7)")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON too")
    args = parser.parse_args(argv)
    if args.tokens < 2 or args.rounds < 1:
        parser.error(f"need at least 2 tokens and 1 round, got {args.tokens} and {args.rounds}")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the JSON."""
    model = load_model(args.model)
    if not isinstance(model, Gemma3):
        raise RequestError(f"{model.name} is no Gemma 3 model; give one, its products are known here")
    result = {"model": model.name, "machine": machine()} | measure(model, args.tokens, args.rounds)
    print(report(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; errors that jaxkv names are printed, not traced."""
    args = parse_arguments(argv)
    try:
        run(args)
    except JaxKVError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
