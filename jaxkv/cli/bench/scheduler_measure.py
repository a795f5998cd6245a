"""Measures the connector's scheduler side and the host manager alone. Prints nothing.

Every figure is a median over repeated calls, with a clock around the calls into the connector only: what a
serving loop and a worker would do in between is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import final

import numpy as np

from jaxkv.cli.bench.series import Measurement, Tell, undisturbed
from jaxkv.hash_chain import ChainRoot, HashChain, TokenIds
from jaxkv.keys import KeyRun, OffloadKey
from jaxkv.offload.base import LookupResult, ReqContext
from jaxkv.replay.crowd import BLOCK, AdmissionTimes, Crowd, FullPool

BATCH_KEYS = 64
_QUIET_STEPS = BLOCK - 4


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is; the last two are a smaller pool and a shorter context to compare with."""

    num_chunks: int = 1_000_000
    context_tokens: int = 131_072
    num_running: int = 256
    repeats: int = 60
    index_chunks: tuple[int, ...] = (10_000, 200_000)
    fewer_chunks: int = 100_000
    shorter_context_tokens: int = 16_384


@final
@dataclass(frozen=True, slots=True)
class CrowdFigures:
    """Steps and admissions at one size of the pool and of the contexts."""

    num_chunks: int
    context_tokens: int
    step: Measurement
    quiet_step: Measurement
    empty_step: Measurement
    device_admission: Measurement
    admission: Measurement
    admission_parts: tuple[Measurement, ...]


@final
@dataclass(frozen=True, slots=True)
class Figures:
    """All that was measured; ``crowds`` begins with the largest pool and longest contexts."""

    sizes: Sizes
    crowds: tuple[CrowdFigures, ...]
    lookups: tuple[Measurement, ...]
    hashing: tuple[Measurement, ...]
    keys: tuple[tuple[int, tuple[Measurement, ...]], ...]

    @property
    def missed(self) -> tuple[Measurement, ...]:
        """Those with a median above their target."""
        largest = self.crowds[0]
        measured = (largest.step, largest.quiet_step, largest.admission, *self.lookups)
        return tuple(one for one in measured if not one.met)


def measure_scheduler(sizes: Sizes, tell: Tell) -> Figures:
    """Measure everything; takes a minute or two at the default sizes."""
    crowds: list[CrowdFigures] = []
    lookups: tuple[Measurement, ...] = ()
    for num_chunks in (sizes.num_chunks, sizes.fewer_chunks):
        tell(f"filling a pool with {num_chunks:,} chunks")
        pool = FullPool(num_chunks, sizes.context_tokens)
        for context_tokens in (sizes.context_tokens, sizes.shorter_context_tokens):
            tell(f"{sizes.num_running} requests of {context_tokens:,} tokens on {num_chunks:,} chunks")
            crowds.append(_measure_crowd(pool, num_chunks, context_tokens, sizes))
        lookups = lookups or _measure_prefix_lookup(pool, sizes)
        pool.connector.shutdown()
    keys = tuple((number, _measure_keys(number, sizes.repeats, tell)) for number in sizes.index_chunks)
    return Figures(sizes, tuple(crowds), lookups, _measure_hashing(sizes), keys)


def _measure_crowd(pool: FullPool, num_chunks: int, context_tokens: int, sizes: Sizes) -> CrowdFigures:
    crowd = Crowd(pool)
    crowd.enter(sizes.num_running, context_tokens)
    with undisturbed():
        crowd.spread()
        busy = [crowd.decode() for _ in range(sizes.repeats)]
        quiet = list(_quiet_steps(crowd, sizes.repeats))
        empty = [crowd.step({}) for _ in range(sizes.repeats)]
        contexts = range(1 + sizes.repeats // 4)
        found = [crowd.admit_on_device(context, context_tokens) for context in contexts]
        times = [crowd.admit_from_host(context, context_tokens) for context in contexts]
    crowd.leave()
    per_step = sizes.num_running // BLOCK
    return CrowdFigures(
        num_chunks,
        context_tokens,
        Measurement(f"step: {per_step} of {sizes.num_running} finish a block", tuple(busy), 0.4e-3),
        Measurement("step: none finishes a block", tuple(quiet), 0.1e-3),
        Measurement("step: nothing is scheduled", tuple(empty)),
        Measurement("a request comes, all on the device", tuple(s - 2 * median(empty) for s in found[1:])),
        *_admission(times[1:], median(empty)),
    )


def _quiet_steps(crowd: Crowd, number: int) -> Iterator[float]:
    """Steps of one token in which no block is finished, the step before included."""
    while number > 0:
        crowd.align(1)
        crowd.decode()
        for _ in range(min(number, _QUIET_STEPS)):
            yield crowd.decode()
        number -= _QUIET_STEPS


def _admission(
    times: Sequence[AdmissionTimes], empty_step_s: float
) -> tuple[Measurement, tuple[Measurement, ...]]:
    """What an admission adds to the steps it takes part in, as a whole and in parts."""
    parts = {
        "get_num_new_matched_tokens": [one.lookup_s for one in times],
        "update_state_after_alloc, twice": [one.allocation_s for one in times],
        "its share of the step that loads": [one.load_step_s - empty_step_s for one in times],
        "its share of the two steps after": [one.first_steps_s - 2 * empty_step_s for one in times],
    }
    total = tuple(map(sum, zip(*parts.values(), strict=True)))
    end = Measurement("its end, not counted", tuple(one.end_s - empty_step_s for one in times))
    return (
        Measurement("a request comes, all on the host", total, 10e-3),
        (*(Measurement(name, tuple(seconds)) for name, seconds in parts.items()), end),
    )


def _measure_prefix_lookup(pool: FullPool, sizes: Sizes) -> tuple[Measurement, ...]:
    """A lookup of whole contexts, each long out of the processor's cache, beside that of a plain dict."""
    asked = [pool.keys(pool.contexts[i % len(pool.contexts)]) for i in range(sizes.repeats // 2)]
    plain = dict.fromkeys(
        key for hashes in pool.contexts for group in range(3) for key in pool.keys(hashes, group)
    )
    names = [list(run) for run in asked]
    with undisturbed():
        found = [_time_lookup_prefix(pool, run) for run in asked]
        got = [_time_dict(plain, keys) for keys in names]
    count = f"{len(asked[0]):,} keys"
    return (
        Measurement(f"lookup_prefix of {count}", tuple(found)),
        Measurement(f"for scale, dict.get among {len(plain):,}", tuple(got)),
    )


def _measure_hashing(sizes: Sizes) -> tuple[Measurement, ...]:
    """Making the hashes of a new prompt, which the loop does before the connector sees it."""
    root = ChainRoot("bench", BLOCK)
    array = np.random.default_rng(0).integers(0, 1 << 18, sizes.context_tokens, np.int32)
    forms = {"an array": array, "a list": array.tolist()}
    with undisturbed():
        return tuple(
            Measurement(
                f"hashes of a prompt in {form}",
                tuple(_time_hashing(root, tokens) for _ in range(sizes.repeats)),
            )
            for form, tokens in forms.items()
        )


def _time_hashing(root: ChainRoot, tokens: TokenIds) -> float:
    start = perf_counter()
    HashChain(root, token_ids=tokens)
    return perf_counter() - start


def _measure_keys(num_chunks: int, repeats: int, tell: Tell) -> tuple[Measurement, ...]:
    """Time per key of the manager's calls in batches, at one number of resident chunks."""
    tell(f"batches of {BATCH_KEYS} keys at {num_chunks:,} chunks")
    pool = FullPool(num_chunks, BATCH_KEYS * BLOCK)
    contexts = [pool.contexts[i * 7919 % len(pool.contexts)] for i in range(repeats)]
    fresh = [pool.new_hashes(BATCH_KEYS) for _ in range(repeats)]
    with undisturbed():
        measured = {
            "lookup": [_time_lookup(pool, pool.keys(hashes)) for hashes in contexts],
            "lookup_prefix": [_time_lookup_prefix(pool, pool.keys(hashes)) for hashes in contexts],
            "load": [_time_load(pool, pool.keys(hashes)) for hashes in contexts],
            "store with eviction": [_time_store(pool, pool.keys(hashes)) for hashes in fresh],
        }
    pool.connector.shutdown()
    return tuple(
        Measurement(name, tuple(one / BATCH_KEYS for one in seconds)) for name, seconds in measured.items()
    )


_CTX = ReqContext("bench")


def _time_lookup(pool: FullPool, run: KeyRun) -> float:
    keys = list(run)
    start = perf_counter()
    answers = [pool.manager.lookup(key, _CTX) for key in keys]
    elapsed = perf_counter() - start
    assert set(answers) == {LookupResult.HIT}
    return elapsed


def _time_lookup_prefix(pool: FullPool, run: KeyRun) -> float:
    start = perf_counter()
    answer = pool.manager.lookup_prefix(run, _CTX)
    elapsed = perf_counter() - start
    assert answer.num_found == len(run), f"{answer.num_found} of {len(run)} keys are there"
    return elapsed


def _time_load(pool: FullPool, run: KeyRun) -> float:
    """Pin, unpin, and the end of the request, at which its chunks are ranked anew."""
    start = perf_counter()
    pool.manager.on_new_request(_CTX)
    pool.manager.prepare_load(run, _CTX)
    pool.manager.complete_load(run, _CTX)
    pool.manager.on_request_finished(_CTX)
    return perf_counter() - start


def _time_store(pool: FullPool, run: KeyRun) -> float:
    """Room for new chunks in a full pool, their arrival, and the end of the request."""
    start = perf_counter()
    pool.manager.on_new_request(_CTX)
    output = pool.manager.prepare_store(run, _CTX)
    assert output is not None
    pool.manager.complete_store(run, _CTX)
    pool.manager.on_request_finished(_CTX)
    elapsed = perf_counter() - start
    assert len(output.keys_to_store) == len(run)
    assert output.evicted_keys, "the pool was not full"
    return elapsed


def _time_dict(table: Mapping[OffloadKey, None], keys: Sequence[OffloadKey]) -> float:
    start = perf_counter()
    for key in keys:
        table.get(key)
    return perf_counter() - start
