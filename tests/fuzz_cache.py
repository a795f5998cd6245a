"""Random runs of the cache machine, by the hundred thousand steps. ``make fuzz`` starts it.

A run is one seed: it draws a setup, then steps and events, drains and checks that nothing is left. What
happened is counted, and kinds of events that never happened fail the whole. A run that fails prints the
command that replays it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from random import Random

from cache_machine import Machine
from cache_setup import draw_setup

STEPS_PER_RUN = 400
MAX_WAITING = 6
MUST_HAPPEN = (
    "requests served",
    "requests found stored completely",
    "preemptions",
    "aborted while waiting",
    "aborted while running",
    "aborted while loading",
    "aborted before the load was sent",
    "loads called off",
    "admissions without room",
    "admissions deferred",
    "deferred: loading",
    "deferred: pending",
    "deferred: retry",
    "promises declined",
    "promises that found no room",
    "blocks copied on write",
    "chunks evicted",
    "device blocks evicted",
    "device hit tokens",
    "device resets",
    "host resets",
    "host resets with transfers in flight",
    "host hit tokens",
    "loads landed",
    "loads failed",
    "stores failed",
    "stores refused at random",
    "stores refused",
    "stores of several requests in one job",
    "transfers that overtook others",
    "skipped: held",
    "skipped: no_state",
    "skipped: refused",
    "skipped: released",
    "skipped: unreachable",
    "drafts accepted",
    "drafts rejected",
    "steps that broke off",
    "steps not reported",
    "states emitted",
    "states handed over at the end",
    "host hits of tails",
    "requests with wishes",
    "runs with 1 workers",
    "runs with 2 workers",
    "runs with 3 workers",
    "runs with 1 blocks per chunk",
    "runs with 2 blocks per chunk",
    "runs with 3 blocks per chunk",
    "runs with a retention interval",
    "runs with draft layers",
    "runs with policy lru",
    "runs with policy arc",
    "chunks offered too seldom",
    "runs with full layers",
    "runs with latent layers",
    "runs with window layers",
    "runs with local layers",
    "runs with state layers",
)


def start_run(seed: int, counts: Counter[str]) -> Machine:
    """The machine of a seed, before its first step."""
    draw = Random(seed)
    return Machine(draw_setup(draw), draw, counts)


def go_on(machine: Machine, num_steps: int = STEPS_PER_RUN) -> None:
    """Steps and events, then the end: all of one run."""
    draw, setup = machine.draw, machine.setup
    for _ in range(num_steps):
        if draw.random() < setup.arrive_odds and len(machine.loop.waiting) < MAX_WAITING:
            machine.arrive()
        if draw.random() < setup.event_odds:
            _do_something(machine, draw.random())
        machine.step(breaks_off=draw.random() < setup.break_odds)
    if draw.random() < 0.5:
        machine.fail_odds = machine.manager.refuse = machine.manager.retry = 0.0
    machine.close()


def _do_something(machine: Machine, dice: float) -> None:
    if dice < 0.3:
        machine.abort()
    elif dice < 0.5:
        machine.preempt()
    elif dice < 0.9:
        machine.copy_block()
    elif machine.setup.resets and dice < 0.95:
        machine.reset_device()
    elif machine.setup.resets:
        machine.reset_host()


def run_seed(seed: int, counts: Counter[str]) -> None:
    """One run, from beginning to end."""
    go_on(start_run(seed, counts))


def run_share(first_seed: int, stride: int, num_steps: int) -> tuple[Counter[str], float, str | None]:
    """Every ``stride``-th seed until enough steps were made: what happened, CPU seconds, what failed."""
    counts: Counter[str] = Counter()
    start_s = time.process_time()
    failure = None
    seed = first_seed
    while counts["steps"] < num_steps and failure is None:
        counts["runs"] += 1
        try:
            run_seed(seed, counts)
        except Exception:
            failure = f"{traceback.format_exc()}\nseed {seed} fails; replay it: {replay_command(seed)}"
        seed += stride
    return counts, time.process_time() - start_s, failure


def replay_command(seed: int) -> str:
    """What to type to see a run again."""
    return f"{sys.executable} {sys.argv[0]} --seed {seed}"


def replay(seed: int, num_events: int) -> None:
    """One run, and where it fails what happened before."""
    counts: Counter[str] = Counter()
    machine = start_run(seed, counts)
    machine.loop.events = deque(maxlen=num_events)
    print(machine.setup)
    try:
        go_on(machine)
    except Exception:
        print("\n".join(machine.loop.events))
        raise
    print(f"seed {seed}: {counts['steps']} steps, nothing wrong")


def fuzz(num_steps: int, first_seed: int, num_jobs: int) -> int:
    """All of it; answers the exit status."""
    counts: Counter[str] = Counter()
    cpu_s, failures = 0.0, []
    start_s = time.perf_counter()
    share = -(-num_steps // num_jobs)
    with ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn")) as processes:
        seeds = [first_seed + job for job in range(num_jobs)]
        results = processes.map(run_share, seeds, [num_jobs] * num_jobs, [share] * num_jobs)
        for of_share, share_cpu_s, failure in results:
            counts.update(of_share)
            cpu_s += share_cpu_s
            failures += [failure] if failure is not None else []
    took_s = time.perf_counter() - start_s
    for name, count in sorted(counts.items()):
        print(f"{count:>12,} {name}")
    print(f"{cpu_s * 1e3 / max(1, counts['steps']):.3f} ms of CPU a step, {took_s:.0f} s on {num_jobs} cores")
    for failure in failures:
        print(failure)
    never = [name for name in MUST_HAPPEN if not counts[name]]
    if never and not failures:
        print(f"never happened, so never tested: {', '.join(never)}")
    return 1 if failures or never else 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, help="replay this one run")
    parser.add_argument("--events", type=int, default=60, help="how many events before a failure are printed")
    options = parser.parse_args()
    if options.seed is not None:
        replay(options.seed, options.events)
        return 0
    return fuzz(options.steps, options.first_seed, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
