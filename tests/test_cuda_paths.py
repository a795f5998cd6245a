"""Which way transfers of a CUDA device go: what is chosen from samples, forced, and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxkv.errors import ConfigError
from jaxkv.transfer.cuda_paths import (
    BLOCK_COUNTS,
    COPY_BYTES,
    DIRECT_US,
    FORCED,
    PATHS_VARIABLE,
    PROBE_BYTES,
    CopySample,
    CudaPaths,
    choose_paths,
    find_paths,
    sample_link,
)

KEY = "a card, CUDA 13000, driver 13000"


def samples_where(takes_us: Callable[[bool, int, int], int]) -> list[CopySample]:
    return sample_link(takes_us)


def a_card(to_host: bool, copy_bytes: int, blocks: int) -> int:
    """Copy engines take 2 us for each copy, a kernel needs 16 blocks of threads for the speed of the link."""
    link_us = 320
    if blocks == 0:
        return max(link_us, 2 * PROBE_BYTES // copy_bytes)
    return link_us * max(16, blocks) // min(16, blocks) if blocks < 16 else link_us


@pytest.fixture(autouse=True)
def file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(PATHS_VARIABLE, raising=False)
    return tmp_path / "jaxkv" / "cuda_paths.json"


def test_long_copies_are_the_engines_and_a_kernel_takes_no_more_blocks_than_it_needs() -> None:
    paths = choose_paths(samples_where(a_card))
    assert paths == CudaPaths(PROBE_BYTES * DIRECT_US // 320, 256 << 10, 16)


def test_engines_that_are_always_as_fast_take_all_staged_copies() -> None:
    assert choose_paths(samples_where(lambda *_: 320)).engine_from_bytes == COPY_BYTES[0]


def test_engines_that_are_slow_one_way_take_no_copies() -> None:
    def slow_to_host(to_host: bool, _copy_bytes: int, blocks: int) -> int:
        return 900 if to_host and blocks == 0 else 320

    assert choose_paths(samples_where(slow_to_host)).engine_from_bytes > 1 << 60


def test_engines_that_lose_at_a_longer_length_do_not_win_at_a_shorter_one() -> None:
    def odd(_to_host: bool, copy_bytes: int, blocks: int) -> int:
        return 900 if blocks == 0 and copy_bytes == 64 << 10 else 320

    assert choose_paths(samples_where(odd)).engine_from_bytes == 256 << 10


def test_a_kernel_that_gains_with_every_block_gets_the_most() -> None:
    assert choose_paths(samples_where(lambda *key: 10_000 // (key[2] or 1))).host_blocks == BLOCK_COUNTS[-1]


def test_the_best_of_several_times_counts_and_no_time_is_none() -> None:
    times = iter([5, 3, 4] + [0] * 10_000)
    first, *others = sample_link(lambda *_: next(times))
    assert first == CopySample(True, COPY_BYTES[0], 0, 3)
    assert {sample.microseconds for sample in others} == {1}


def test_what_was_measured_is_kept_for_the_next_process(file_of_its_own: Path) -> None:
    paths, found = find_paths(KEY, lambda: samples_where(a_card))
    assert found == "measured now"
    again, found = find_paths(KEY, lambda: pytest.fail("measured twice"))
    assert (again, found) == (paths, f"measured before, kept in {file_of_its_own}")
    other, found = find_paths("another card", lambda: samples_where(lambda *_: 320))
    assert found == "measured now"
    assert other != paths
    assert find_paths(KEY, lambda: pytest.fail("forgotten"))[0] == paths


def a_file(**values: object) -> str:
    return json.dumps({KEY: {"direct_below_bytes": 0, "engine_from_bytes": 0, "host_blocks": 8} | values})


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"a card": 3}', '{"a card": {"direct": 1}}'),
        *(
            a_file(host_blocks=0),
            a_file(host_blocks=True),
            a_file(host_blocks="8"),
            a_file(host_blocks=1 << 40),
        ),
        *(a_file(engine_from_bytes=-1), a_file(direct_below_bytes=1 << 63), a_file(direct_below_bytes=0.5)),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_written_anew(content: str, file_of_its_own: Path) -> None:
    file_of_its_own.parent.mkdir()
    file_of_its_own.write_text(content)
    assert find_paths(KEY, lambda: samples_where(a_card))[1] == "measured now"
    assert find_paths(KEY, lambda: pytest.fail("not kept"))[1].startswith("measured before")


def test_paths_name_the_value_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="host_blocks is 0; give a whole number from 1 to 65536"):
        CudaPaths(0, 0, 0)


def test_a_file_that_cannot_be_written_costs_nothing_but_the_next_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert find_paths(KEY, lambda: samples_where(a_card))[1] == "measured now"


@pytest.mark.parametrize("name", FORCED)
def test_the_environment_settles_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATHS_VARIABLE, name)
    paths, found = find_paths(KEY, lambda: pytest.fail("measured"))
    assert (paths, found) == (FORCED[name], f"forced by {PATHS_VARIABLE}={name}")


def test_an_unknown_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATHS_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="JAXKV_CUDA_PATH is 'fast'; use one of direct, engine, kernel"):
        find_paths(KEY, list)
