"""The README's serving-loop snippet, run as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.connector import SchedulerOutput
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.keys import BlockHash, BlockId

README = Path(__file__).parent.parent / "README.md"
SIZES = {"layer.0": 1024, "layer.1": 256, "layer.2": 256}
PROMPT = list(range(48))
MAX_STEPS = 100


@dataclass
class ARequest:
    request_id: str
    token_ids: list[int]
    num_computed_tokens: int = 0
    block_hashes: list[BlockHash] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.block_hashes = HashChain(ChainRoot("readme", 16), token_ids=self.token_ids).block_hashes

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)


class Loop:
    """What the snippet expects around it: caches, block tables and a model that writes its pages."""

    def __init__(self) -> None:
        self.kv_caches = {
            name: tuple(jnp.zeros((blocks, 16, 2, 64), jnp.bfloat16) for _ in range(2))
            for name, blocks in SIZES.items()
        }
        self.next_free = 1

    def allocate_blocks(self, request: ARequest, num_tokens: int) -> list[list[BlockId | None]]:
        blocks = [BlockId(self.next_free + i) for i in range(3)]
        self.next_free += 3
        return [list(blocks), list(blocks)]

    def forward(self, kv_caches, scheduler_output):
        scale = sum(scheduler_output.num_scheduled_tokens.values())
        return {
            name: tuple(leaf.at[1:4].add(scale * (1 + i)) for i, leaf in enumerate(leaves))
            for name, leaves in kv_caches.items()
        }


def pages(kv_caches, blocks):
    return {
        name: [np.asarray(leaf[jnp.array(blocks)]) for leaf in leaves] for name, leaves in kv_caches.items()
    }


def test_snippet_brings_back_the_blocks_of_a_request_that_finished():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    loop = Loop()
    names = {"kv_caches": loop.kv_caches, "allocate_blocks": loop.allocate_blocks, "forward": loop.forward}
    exec(snippet, names)
    connector, admit, run_step = names["connector"], names["admit"], names["run_step"]

    first = ARequest("first", PROMPT)
    assert admit(first, 0)
    kv_caches, _ = run_step(SchedulerOutput({"first": 48}), loop.kv_caches)
    first.num_computed_tokens = 48
    written = pages(kv_caches, [1, 2])
    connector.request_finished_all_groups(first, [[], []])
    kv_caches, _ = run_step(SchedulerOutput(finished_req_ids={"first"}), kv_caches)

    second = ARequest("second", PROMPT)
    is_admitted, received = False, set()
    for _ in range(MAX_STEPS):  # a transfer may end in a later step than the one it was submitted in
        is_admitted = is_admitted or admit(second, 0)
        kv_caches, received = run_step(SchedulerOutput(), kv_caches)
        if received:
            break
        jax.block_until_ready(kv_caches)
    assert received == {"second"}
    restored = pages(kv_caches, [4, 5])
    for name, leaves in written.items():
        for leaf, back in zip(leaves, restored[name], strict=True):
            assert leaf.any()
            np.testing.assert_array_equal(leaf.view(np.uint16), back.view(np.uint16))
    connector.request_finished_all_groups(second, [[], []])
    run_step(SchedulerOutput(finished_req_ids={"second"}), kv_caches)
    assert connector.leaks() == []
    connector.shutdown()


def test_snippet_is_about_thirty_lines():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 36


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_first_screen_shows_the_two_commands(command):
    assert command in "\n".join(README.read_text().splitlines()[:25])


@pytest.mark.parametrize("page", sorted((README.parent / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_include_of_the_docs_is_one_that_the_docs_understand(page: Path) -> None:
    """A formatter of Python in Markdown takes ``--8<--`` for an expression and puts spaces into it."""
    for line in page.read_text().splitlines():
        if re.match(r"\s*-+\s*8\s*<", line):
            included = re.fullmatch(r'--8<-- "(.*?)(:.*)?"', line)
            assert included, line
            assert (README.parent / included[1]).is_file(), line
