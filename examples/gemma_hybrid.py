"""Serves prompts of a hybrid model one after another, pass after pass, with its KV cache offloaded or not.

    python examples/gemma_hybrid.py --model gemma3-270m --prompts tests/data/gemma3_270m_reference.json \\
        --passes 2 --max-new-tokens 16 --offload on --device-bytes 64MiB --host-bytes 1GiB --out result.json

Nothing is reset between passes. A prompt pushed out of the device cache comes back from the host pool with
``--offload on`` and is computed again with ``off``; the tokens are the same. The result says for every
request where its prompt came from and how long its first token took.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from jaxkv_models.weights import load_model

from jaxkv import JaxKVError, OffloadingConfig, RequestError
from jaxkv.cli.arguments import count, size
from jaxkv.serving import EngineConfig, LLMEngine, SamplingParams, build_engine


@final
@dataclass(frozen=True, slots=True)
class Prompt:
    """A named list of token ids."""

    name: str
    ids: tuple[int, ...]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--help`` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, help="gemma3-270m, a .gguf file or a Hugging Face directory"
    )
    parser.add_argument(
        "--prompts", required=True, type=Path, help='JSON list of {"name", "prompt_ids"}, or {"cases": [...]}'
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=16, help="tokens of every request (default 16)"
    )
    parser.add_argument(
        "--passes", type=count, default=1, help="how often all prompts are served (default 1)"
    )
    parser.add_argument(
        "--offload", choices=("on", "off"), default="on", help="host pool or device cache alone"
    )
    parser.add_argument(
        "--device-bytes", type=size, default="64MiB", help="ceiling of all cache arrays (default 64MiB)"
    )
    parser.add_argument(
        "--host-bytes", type=size, default="1GiB", help="size of the host pool (default 1GiB)"
    )
    parser.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of keys and values",
    )
    parser.add_argument(
        "--out", type=Path, help="where to write the result as JSON (default: standard output)"
    )
    return parser.parse_args(argv)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of ``path``; raises ``RequestError`` for anything that is not a list of token ids."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}; give a JSON file") from error
    cases = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(cases, list) or not cases:
        raise RequestError(f'{path} holds no prompts; expected a list of {{"name", "prompt_ids"}}')
    return [_read_prompt(case, index, path) for index, case in enumerate(cases)]


def _read_prompt(case: Any, index: int, path: Path) -> Prompt:
    ids = case.get("prompt_ids") if isinstance(case, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RequestError(f'prompt {index} of {path} has no "prompt_ids", a list of integers')
    if not ids:
        raise RequestError(f"prompt {index} of {path} is empty; give at least one token")
    return Prompt(str(case.get("name") or f"case{index}"), tuple(ids))


def make_engine(args: argparse.Namespace, prompts: Sequence[Prompt]) -> LLMEngine:
    """An engine for one request at a time, with the caches and the pool the arguments ask for."""
    offloading = OffloadingConfig(host_bytes=args.host_bytes, offload_prompt_only=False)
    model = load_model(args.model)
    longest = max(len(prompt.ids) for prompt in prompts) + args.max_new_tokens
    if longest > model.max_model_len:
        raise RequestError(
            f"the longest prompt and {args.max_new_tokens} new tokens make {longest} tokens, "
            f"but {model.name} can hold {model.max_model_len}; shorten the prompt"
        )
    return build_engine(
        model,
        device_bytes=args.device_bytes,
        max_tokens=longest,
        offloading=offloading if args.offload == "on" else None,
        engine_config=EngineConfig(max_num_seqs=1),
        cache_dtype=args.cache_dtype,
    )


def serve(engine: LLMEngine, prompts: Sequence[Prompt], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one record per request, in the order served."""
    params = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True)
    for number in range(1, args.passes + 1):
        for prompt in prompts:
            (output,) = engine.generate([prompt.ids], params)
            record = {"name": prompt.name, "pass": number, "output_ids": list(output.output_ids)}
            yield record | asdict(output.metrics)


def totals(engine: LLMEngine, compiled_before: int) -> dict[str, int]:
    """What was moved and thrown out over all passes."""
    moved = engine.connector.get_stats()  # None without a host pool
    return {
        "stored_bytes": moved.stored_bytes if moved else 0,
        "loaded_bytes": moved.loaded_bytes if moved else 0,
        "host_evictions": moved.evicted_chunks if moved else 0,
        "device_evictions": engine.stats.device_evictions,
        "compilations_after_warmup": engine.num_compilations - compiled_before,
    }


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Write ``result`` whole or not at all."""
    text = json.dumps(result, indent=1) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    part = out.with_name(out.name + ".part")
    part.write_text(text)
    os.replace(part, out)


def run(args: argparse.Namespace) -> int:
    """Serve everything; 0, or 130 when interrupted (what was finished until then is written all the same)."""
    prompts = read_prompts(args.prompts)
    engine = make_engine(args, prompts)
    records: list[dict[str, Any]] = []
    status = 0
    try:
        engine.warmup()
        compiled = engine.num_compilations
        try:
            for record in serve(engine, prompts, args):
                records.append(record)
                print(_summary(record), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            status = 130
            print(f"interrupted after {len(records)} requests; writing those", file=sys.stderr)
        write_result({"requests": records, "totals": totals(engine, compiled)}, args.out)
    finally:
        engine.shutdown()
    return status


def _summary(record: dict[str, Any]) -> str:
    return (
        f"pass {record['pass']}  {record['name']:<20} {record['prompt_tokens']:>6} prompt tokens: "
        f"{record['device_hit_tokens']} from device, {record['host_hit_tokens']} from host, "
        f"{record['computed_tokens']} computed; first token after {record['ttft_s']:.3f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; errors that jaxkv names are printed, not traced."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except JaxKVError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
