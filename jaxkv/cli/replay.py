"""``jaxkv replay``: what a host pool of a given size would do for a trace, without a model or its memory."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxkv.cli.arguments import count, retention, share, size, whole
from jaxkv.cli.environment import describe_environment
from jaxkv.cli.extras import needs_extra
from jaxkv.replay.generator import Length, TraceParams, generate_trace
from jaxkv.replay.models import MODEL_SHAPES
from jaxkv.replay.run import Deployment, ReplayResult, replay
from jaxkv.replay.trace import TraceRequest
from jaxkv.replay.trace_file import load_trace, save_trace

_HOST_BYTES = ("32GiB", "64GiB", "128GiB", "256GiB")

_EPILOG = """\
Requests are served one after another by the real connector, host manager and device cache; only bytes are
not moved, so a pool of a terabyte takes none and a thousand long prompts take seconds.

columns:
  device, host, computed   where the tokens of all prompts came from, in percent
  hit      device + host
  optimum  the most that any pool of this size could have reached, had it known the future (Belady), counting
           only what full attention needs; a hybrid model's windows and states make every real pool smaller
  limit    the same with a pool that never evicts: the rest of the tokens was never seen before
  servable distinct prompts the pool alone could serve at the end, up to their last block

examples:
  jaxkv replay --model llama-like --host-bytes 32GiB 128GiB --policy lru arc
  jaxkv replay --retention dense 0 --plot retention.png
  jaxkv replay --trace conversations.jsonl --json > result.json
  jaxkv replay --requests 5000 --documents 500 --save-trace big.jsonl

A trace file has a JSON object on each line, such as
  {"name": "c3.1", "arrival_s": 2.5, "prompt": [[7, 1200], [9, 80]], "output": [10, 300]}
where each pair is a stream of tokens and how many of them. Traces published by Mooncake can be read too.
"""


def add_parser(commands: Any) -> None:
    """Add ``replay`` to the subcommands."""
    parser = commands.add_parser(
        "replay",
        help="replay a trace of requests: hit rate, traffic and evictions by size of the host pool",
        description="Replay a trace of multi-turn requests through the scheduler alone, once for every "
        "combination of --host-bytes, --policy and --retention, beside the best that was possible.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_deployment(parser.add_argument_group("what serves"))
    _add_trace(parser.add_argument_group("the trace"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw hit rate against pool size")
    parser.set_defaults(run=run)


def _add_deployment(group: Any) -> None:
    defaults = Deployment()
    group.add_argument(
        "--model",
        default=defaults.model,
        help="; ".join(f"{shape.name}: {shape.description}" for shape in MODEL_SHAPES.values())
        + "; or the dotted path of a function that answers ((layer names, spec), ...) for a block size "
        + f"(default {defaults.model})",
    )
    group.add_argument("--device-bytes", type=size, default="24GiB", help="device cache (default 24GiB)")
    group.add_argument(
        "--host-bytes",
        type=size,
        nargs="+",
        default=[size(text) for text in _HOST_BYTES],
        metavar="SIZE",
        help=f"host pools to compare (default {' '.join(_HOST_BYTES)})",
    )
    group.add_argument(
        "--policy", nargs="+", default=["lru"], help="eviction policies to compare (default lru)"
    )
    group.add_argument(
        "--retention",
        type=retention,
        nargs="+",
        default=[None],
        metavar="N",
        help="what windows and states keep: 'dense' every block, 0 ends of prompts and branch points, "
        "N also every N tokens (default dense)",
    )
    group.add_argument("--block-size", type=count, default=16, help="tokens per block (default 16)")
    group.add_argument("--blocks-per-chunk", type=count, default=1, help="blocks stored together (default 1)")
    group.add_argument(
        "--prefill-tokens", type=count, default=2048, help="prompt tokens of a step (default 2048)"
    )
    group.add_argument("--prompt-only", action="store_true", help="store prompts only, not replies")


def _add_trace(group: Any) -> None:
    made = TraceParams()
    group.add_argument("--trace", type=Path, metavar="FILE", help="replay this file, generate nothing")
    group.add_argument("--save-trace", type=Path, metavar="FILE", help="write the trace as JSON lines")
    for option, number, text in (
        ("--requests", made.num_requests, "requests"),
        ("--max-tokens", made.max_tokens, "longest request"),
        ("--system-prompts", made.num_system_prompts, "system prompts"),
        ("--documents", made.num_documents, "documents that conversations are about"),
        ("--document-tokens", made.document_tokens.median, "median length of a document"),
        ("--turns", round(made.mean_turns), "mean turns of a conversation"),
    ):
        group.add_argument(option, type=count, default=number, help=f"{text} (default {number})")
    for option, part, text in (
        ("--document-share", made.document_share, "conversations about a document"),
        ("--branch-share", made.branch_share, "turns that continue an earlier turn"),
    ):
        group.add_argument(option, type=share, default=part, help=f"{text} (default {part})")
    group.add_argument(
        "--zipf",
        type=float,
        default=made.zipf_exponent,
        help=f"how uneven the popularity of prompts and documents is (default {made.zipf_exponent})",
    )
    group.add_argument("--seed", type=whole, default=made.seed, help=f"(default {made.seed})")


def run(args: argparse.Namespace) -> int:
    """Replay every combination, show all of them."""
    trace = load_trace(args.trace) if args.trace else generate_trace(_trace_params(args))
    if args.save_trace:
        save_trace(args.save_trace, trace)
    if args.json:
        results = [replay(trace, deployment) for deployment in deployments(args)]
        print(json.dumps(as_json(trace, results), indent=2))
    else:
        with needs_extra("bench", "the table of a replay"):
            from jaxkv.cli import replay_report  # noqa: PLC0415
        results = replay_report.replay_all(trace, list(deployments(args)))
        replay_report.print_report(trace, results)
    if args.plot:
        with needs_extra("bench", "a plot"):
            from jaxkv.cli import replay_plot  # noqa: PLC0415
        replay_plot.save_plot(args.plot, results)
    return 0


def deployments(args: argparse.Namespace) -> Iterator[Deployment]:
    """One deployment for each combination of policy, retention and pool size."""
    for policy, interval, host_bytes in itertools.product(
        args.policy, args.retention, sorted(args.host_bytes)
    ):
        yield Deployment(
            model=args.model,
            block_size=args.block_size,
            device_bytes=args.device_bytes,
            host_bytes=host_bytes,
            eviction_policy=policy,
            retention_interval=interval,
            prefill_tokens=args.prefill_tokens,
            blocks_per_chunk=args.blocks_per_chunk,
            offload_prompt_only=args.prompt_only,
        )


def as_json(trace: Sequence[TraceRequest], results: Sequence[ReplayResult]) -> dict[str, Any]:
    """What tables and plots are made of, as plain values."""
    return {
        "environment": describe_environment(),
        "trace": {
            "requests": len(trace),
            "prompt_tokens": sum(request.prompt_tokens for request in trace),
            "output_tokens": sum(request.output_tokens for request in trace),
            "longest_tokens": max(request.num_tokens for request in trace),
        },
        "runs": [
            {
                **asdict(result),
                "computed_tokens": result.computed_tokens,
                "hit_rate": result.hit_rate,
                "optimal_hit_rate": result.optimal_hit_rate,
                "highest_hit_rate": result.highest_hit_rate,
            }
            for result in results
        ],
    }


def _trace_params(args: argparse.Namespace) -> TraceParams:
    return TraceParams(
        num_requests=args.requests,
        seed=args.seed,
        max_tokens=args.max_tokens,
        num_system_prompts=args.system_prompts,
        num_documents=args.documents,
        zipf_exponent=args.zipf,
        document_share=args.document_share,
        branch_share=args.branch_share,
        mean_turns=args.turns,
        document_tokens=Length(args.document_tokens, TraceParams().document_tokens.sigma),
    )
