"""Runs the demo: loads the model, serves the workload twice, shows the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxkv_models.weights import load_model, load_tokenizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxkv.cli.report import Comparison, print_report, save_plot
from jaxkv.cli.workload import Conversation, Turn, longest_request, make_conversations, num_turns, serve_turns
from jaxkv.connector import OffloadingConfig
from jaxkv.serving import EngineConfig, LLMEngine, Model, build_engine


def run_demo(args: argparse.Namespace) -> int:
    """Serve with offloading off, then on; print tables, save the plot."""
    console = Console()
    with console.status(f"loading {args.model}"):
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.model)
        talks = make_conversations(lambda text: tokenizer.encode(text).ids, args.document_tokens)
    longest = longest_request(talks, args.reply_tokens)
    console.print(
        f"[bold]{model.name}[/]: {len(talks)} conversations of up to {longest} tokens, "
        f"device cache {args.device_bytes / 2**20:.0f} MiB, host pool {args.host_bytes / 2**20:.0f} MiB"
    )
    offloading = OffloadingConfig(host_bytes=args.host_bytes, offload_prompt_only=False)
    with _progress(console) as progress:
        off, _ = _serve(model, talks, args, None, progress)
        on, engine = _serve(model, talks, args, offloading, progress)
    comparison = Comparison(off, on, engine.connector.get_stats(), engine.stats.device_evictions)
    print_report(console, comparison)
    save_plot(args.plot, comparison)
    console.print(f"plot: {args.plot.resolve()}")
    return _verdict(console, comparison)


def _serve(
    model: Model,
    talks: Sequence[Conversation],
    args: argparse.Namespace,
    offloading: OffloadingConfig | None,
    progress: Progress,
) -> tuple[list[Turn], LLMEngine]:
    name = "offload off" if offloading is None else "offload on "
    task = progress.add_task(f"{name}  compiling", total=num_turns(talks))
    engine = build_engine(
        model,
        device_bytes=args.device_bytes,
        max_tokens=longest_request(talks, args.reply_tokens),
        offloading=offloading,
        engine_config=EngineConfig(max_num_seqs=1),
    )
    try:
        engine.warmup()
        turns = []
        progress.update(task, description=f"{name}  serving")
        for turn in serve_turns(engine, talks, args.reply_tokens):
            turns.append(turn)
            progress.update(task, advance=1, description=f"{name}  {turn.name}")
        progress.update(task, description=f"{name}  done")
    finally:
        engine.shutdown()
    return turns, engine


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<36}"),
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
