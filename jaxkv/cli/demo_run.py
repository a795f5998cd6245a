"""Runs the demo: loads the model, serves every request without and with offloading, shows the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from jaxkv_models.weights import load_model, load_tokenizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxkv.cli.report import Comparison, print_report, save_plot
from jaxkv.cli.workload import Conversation, longest_request, make_conversations, num_turns, serve_turns
from jaxkv.connector import OffloadingConfig
from jaxkv.serving import EngineConfig, LLMEngine, Model, build_engine


def run_demo(args: argparse.Namespace) -> int:
    """Serve the workload with offloading off and on, print the tables, save the plot."""
    console = Console()
    with console.status(f"loading {args.model}"):
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.model)
    talks = make_conversations(lambda text: tokenizer.encode(text).ids, args.document_tokens)
    console.print(
        f"[bold]{model.name}[/]: {len(talks)} conversations of up to "
        f"{longest_request(talks, args.reply_tokens)} tokens, "
        f"device cache {args.device_bytes / 2**20:.0f} MiB, host pool {args.host_bytes / 2**20:.0f} MiB"
    )
    comparison = _compare(model, talks, args, console)
    print_report(console, comparison)
    save_plot(args.plot, comparison)
    console.print(f"plot: {args.plot.resolve()}", soft_wrap=True)
    return _verdict(console, comparison)


def _compare(
    model: Model, talks: Sequence[Conversation], args: argparse.Namespace, console: Console
) -> Comparison:
    """Serve each request by both engines in turn, so that a machine that slows down slows both."""
    offloading = OffloadingConfig(args.host_bytes, offload_prompt_only=False)
    off, on = [], []
    with ExitStack() as stack, _progress(console) as progress:
        task = progress.add_task("compiling", total=num_turns(talks))
        engines = [_make_engine(model, talks, args, choice) for choice in (None, offloading)]
        for engine in engines:
            stack.callback(engine.shutdown)
            engine.warmup()
        both = (serve_turns(engine, talks, args.reply_tokens) for engine in engines)
        for turn_off, turn_on in zip(*both, strict=True):
            off.append(turn_off)
            on.append(turn_on)
            progress.update(task, advance=1, description=turn_on.name)
        progress.update(task, description="served")
        stats = engines[1].connector.get_stats()
        return Comparison(off, on, stats, engines[1].stats.device_evictions)


def _make_engine(
    model: Model,
    talks: Sequence[Conversation],
    args: argparse.Namespace,
    offloading: OffloadingConfig | None,
) -> LLMEngine:
    return build_engine(
        model,
        device_bytes=args.device_bytes,
        max_tokens=longest_request(talks, args.reply_tokens),
        offloading=offloading,
        engine_config=EngineConfig(max_num_seqs=1),
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _verdict(console: Console, comparison: Comparison) -> int:
    if not comparison.tokens_equal:
        console.print("[red]offloading changed tokens; this must not happen[/]")
        return 1
    if comparison.transfers.loaded_bytes == 0:
        console.print(
            "[red]nothing was loaded from the host: make --device-bytes smaller or --host-bytes larger[/]"
        )
        return 1
    return 0
