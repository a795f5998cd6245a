"""The benchmarks of the command line at toy sizes: what they print, write and judge. No time is judged."""

from __future__ import annotations

import argparse
import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxkv.cli.bench.all_command import add_all
from jaxkv.cli.bench.base import Bench
from jaxkv.cli.bench.copy_caches import make_shape
from jaxkv.cli.bench.copy_contenders import HostSide, JaxSide
from jaxkv.cli.bench.copy_measure import CopyFigures, CopyResult, CopySettings
from jaxkv.cli.bench.cuda_measure import LINK, CudaFigures, CudaResult, CudaSettings
from jaxkv.cli.bench.cuda_report import print_cuda
from jaxkv.cli.bench.memory_measure import MemoryFigures, MemorySettings, PeakResult, PoolResult
from jaxkv.cli.bench.memory_report import print_memory
from jaxkv.cli.bench.parser import BENCHES
from jaxkv.cli.bench.series import Contender, Measurement, Ratio, interleave
from jaxkv.cli.bench.serve_model import StandInModel
from jaxkv.cli.bench.serve_ttft import TtftSettings, compare_ttft, make_prompts
from jaxkv.cli.main import main

PNG = b"\x89PNG"
COPY = ["bench", "copy", "--pages", "4KiB", "--bytes", "1MiB", "--repeats", "1"]


def test_every_round_times_every_contender_once_after_one_that_does_not_count():
    calls: list[str] = []
    contenders = [
        Contender("a", lambda: calls.append("a"), lambda: calls.append("prepare a")),
        Contender("b", lambda: calls.append("b")),
    ]
    seconds = interleave(contenders, 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert calls[:3] == ["prepare a", "a", "b"]
    rounds = [calls[3 * i : 3 * i + 3] for i in range(4)]
    assert all(sorted(one) == ["a", "b", "prepare a"] for one in rounds)
    assert all(one.index("prepare a") + 1 == one.index("a") for one in rounds)


def test_a_ratio_is_met_to_the_digits_it_is_shown_with():
    assert Ratio("it", (0.996,), at_least=1.0).met
    assert not Ratio("it", (0.994,), at_least=1.0).met
    assert Ratio("it", (0.1,)).met


def copied(page_bytes: int, seconds: dict[str, float], *, strided: bool = False) -> CopyResult:
    shape = make_shape(page_bytes, 1, 1 << 20, strided=strided)
    return CopyResult("offload", shape, 2, {name: (value,) for name, value in seconds.items()})


def test_copies_are_held_against_the_contiguous_copy_by_page_size():
    roof = "one copy, contiguous"
    times = {"jaxkv": 2.0, roof: 1.5}
    wanted = {4096: 0.7, 16384: 0.85, 65536: 0.88, 1 << 18: 1.0, 1 << 21: 1.0}
    results = {page: copied(page, times) for page in wanted}
    assert {page: result.ratio(roof).at_least for page, result in results.items()} == wanted
    assert {page: result.ratio(roof).met for page, result in results.items()} == {
        page: least <= 0.75 for page, least in wanted.items()
    }
    assert results[4096].gb_per_s("jaxkv") == pytest.approx((1 << 20) / 2e9)


def test_pages_in_pieces_are_held_against_whole_pages_by_their_shares_of_the_roof():
    whole = copied(4096, {"jaxkv": 2.0, "one copy, contiguous": 1.0})
    pieces = copied(0, {"jaxkv": 4.0, "one copy, contiguous": 1.5}, strided=True)
    figures = CopyFigures(CopySettings(), (whole, pieces))
    ((result, ratio),) = figures.strided_ratios
    assert result is pieces
    assert (ratio.median, ratio.at_least) == (pytest.approx(0.75), 0.75)
    assert pieces.ratio("one copy, contiguous").at_least is None


@pytest.mark.parametrize("strided", [False, True])
def test_what_copies_are_compared_with_moves_the_blocks_it_was_told(strided):
    shape = make_shape(8192, 2, 1 << 19, strided=strided)
    ids = np.random.default_rng(0).permutation(shape.num_blocks).astype(np.int32)
    host = HostSide(shape, ids, 2)
    plain = JaxSide(shape, ids, host.buffers)
    leaves = host.leaves.copy()
    plain.leaves = [jnp.array(leaf) for leaf in leaves]
    taken = np.take(leaves, ids, axis=1 + shape.block_axis)
    for move in (lambda: host.take(1), lambda: host.take(2), plain.gather_and_copy):
        host.buffers[:] = 0
        move()
        assert np.array_equal(host.buffers, taken)
    for move in (lambda: host.put(1), lambda: host.put(2)):
        host.leaves[:] = 0
        move()
        assert np.array_equal(host.leaves, leaves)
    host.copy_out()
    in_order = host.buffers.reshape(2, shape.num_blocks, -1)
    assert np.array_equal(in_order, np.moveaxis(taken, 1 + shape.block_axis, 1).reshape(in_order.shape))
    host.leaves[:] = 0
    host.copy_in()
    assert np.array_equal(host.leaves, leaves)
    plain.make_pages()
    plain.leaves = [jnp.zeros_like(leaf) for leaf in plain.leaves]
    plain.scatter()
    assert np.array_equal(np.stack(plain.leaves), leaves)
    host.close()


def test_copy_benchmark_prints_rates_and_ratios_and_draws_them(capsys, tmp_path):
    assert main([*COPY, "--plot", str(tmp_path / "copy.png")]) == 0
    text = capsys.readouterr().out
    for part in ("offload, 1 leaf", "restore, 1 leaf", "4 KiB runs", "copying alone", "leaf[ids]", "cpu"):
        assert part in text
    assert (tmp_path / "copy.png").read_bytes().startswith(PNG)


def test_copy_benchmark_gives_json_and_judges_when_asked(capsys):
    status = main([*COPY, "--leaves", "2", "--no-strided", "--json", "--check"])
    document = json.loads(capsys.readouterr().out)
    assert document["bench"] == "copy"
    assert [(one["direction"], one["run_bytes"], one["leaves"]) for one in document["results"]] == [
        ("offload", 4096, 2),
        ("restore", 4096, 2),
    ]
    ratios = [ratio for one in document["results"] for ratio in one["jaxkv_times"]]
    judged = [ratio for ratio in (*ratios, *document["strided_times"]) if ratio["at_least"] is not None]
    missed = [ratio for ratio in judged if round(ratio["median"], 2) < ratio["at_least"]]
    assert status == (1 if missed else 0)


def test_copy_benchmark_has_as_many_threads_as_it_is_told(capsys):
    assert main([*COPY, "--threads", "1", "--no-strided", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["threads"] for one in document["results"]} == {1}
    assert main([*COPY, "--threads", "4096"]) == 2
    assert "4096 threads cannot be measured" in capsys.readouterr().err


@pytest.mark.parametrize("pages", ["1KiB", "6KiB"])
def test_page_sizes_that_cannot_be_made_are_refused(capsys, pages):
    with pytest.raises(SystemExit):
        main(["bench", "copy", "--pages", pages])
    assert "must be a multiple of 4KiB" in capsys.readouterr().err


def moved(direction: str, seconds: dict[str, tuple[float, ...]]) -> CudaResult:
    return CudaResult(direction, make_shape(4096, 1, 1 << 20), seconds, {"jaxkv": (0.5, 0.5, 0.5)})


def test_copies_of_a_gpu_are_shown_as_rates_and_shares_of_the_link():
    out = moved("offload", {"jaxkv": (1.0, 2.0, 4.0), LINK: (0.5, 1.5, 1.0), "other": (8.0, 8.0, 8.0)})
    back = moved("restore", {"jaxkv": (1.0, 1.0, 1.0), LINK: (1.0, 1.0, 1.0)})
    assert out.gb_per_s("jaxkv") == pytest.approx((1 << 20) / 2e9)
    assert out.on_device_gb_per_s("jaxkv") == pytest.approx((1 << 20) / 5e8)
    assert out.of_link("jaxkv") == 0.5
    contenders = {one["name"]: one for one in out.as_json()["contenders"]}
    assert contenders["jaxkv"]["on_device_gb_s"] == out.on_device_gb_per_s("jaxkv")
    assert contenders["other"]["on_device_gb_s"] is None
    console = Console(file=io.StringIO(), width=100)
    print_cuda(CudaFigures(CudaSettings(), "a GPU", "some way", (out, back)), console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    for line in ("jaxkv goes: some way", "offload, 1 leaf 4 KiB", "restore, 1 leaf 4 KiB", "jaxkv 0.50"):
        assert line in lines


def test_a_benchmark_of_gpus_says_so_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert main(["bench", "cuda"]) == 2
    assert "this benchmark wants an NVIDIA GPU" in capsys.readouterr().err


def test_a_benchmark_of_the_host_is_refused_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert main(COPY) == 2
    assert "'jaxkv bench cuda'" in capsys.readouterr().err


@pytest.mark.cuda
def test_cuda_benchmark_gives_json(capsys):
    argv = ["bench", "cuda", "--pages", "4KiB", "--bytes", "1MiB", "--repeats", "1", "--json"]
    assert main([*argv, "--leaves", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    results = document["results"]
    assert [(one["direction"], one["run_bytes"]) for one in results] == [
        ("offload", 4096),
        ("restore", 4096),
        ("offload", 4096),
        ("restore", 4096),
    ]
    names = {one["name"] for result in results for one in result["contenders"]}
    assert {"jaxkv", "jaxkv, direct", "jaxkv, engine", "jaxkv, kernel", LINK} <= names


def test_latency_benchmark_names_each_way_and_what_it_should_take(capsys, tmp_path):
    argv = ["bench", "latency", "--leaves", "1", "2", "--cache-bytes", "1MiB", "--repeats", "1"]
    status = main([*argv, "--json", "--check", "--plot", str(tmp_path / "latency.png")])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(one["direction"], one["leaves"]) for one in results] == [
        ("offload", 1), ("restore", 1), ("offload", 2), ("restore", 2),
    ]  # fmt: skip
    names = {measurement["name"] for one in results for measurement in one["measurements"]}
    assert names == {"the op in a program", "BlockTransfer, waited for", "a program that does nothing"}
    op = results[0]["measurements"][0]
    assert (op["target_s"], op["count"]) == (8e-6, 20)
    assert status == (0 if op["median_s"] <= 8e-6 else 1)
    assert (tmp_path / "latency.png").read_bytes().startswith(PNG)


def test_latency_benchmark_prints_a_table(capsys):
    assert main(["bench", "latency", "--leaves", "1", "--cache-bytes", "1MiB", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("offload, 1 leaf", "BlockTransfer, waited for", "at most", "cpu"):
        assert part in text


def test_memory_benchmark_tells_cold_from_warm_and_what_transfers_take(capsys, tmp_path):
    argv = ["bench", "memory", "--pools", "8MiB", "1048576GiB", "--bytes", "64MiB", "--repeats", "1"]
    assert main([*argv, "--json", "--plot", str(tmp_path / "memory.png")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["too_large"] == [1 << 50]
    assert document["pools"][0]["bytes"] == 8 << 20
    extra = {peak["name"]: peak["extra_bytes"] for peak in document["peaks"]}
    assert extra["jaxkv offload"] < (32 << 20) < extra["jit gather + copy"]
    assert extra["jaxkv restore"] < (32 << 20) < extra["jit scatter of host pages"]
    assert (tmp_path / "memory.png").read_bytes().startswith(PNG)


def test_memory_is_shown_in_tables():
    pool = PoolResult(4 << 30, 2.0, Measurement("warm", (0.5,), 0.4), Measurement("np.ones", (1.0,)), True, 0)
    peaks = (PeakResult("jaxkv offload", None),)
    console = Console(file=io.StringIO(), width=80)
    print_memory(MemoryFigures(MemorySettings(), (pool,), peaks, (1 << 50,)), console)
    text = console.file.getvalue()
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("4 "))
    assert row == ["4", "2.000", "0.500", "0.500", "0.500", "0.4", "1.000", "yes", "0"]
    assert "no room here for a pool of 1048576 GiB" in text
    assert "unknown" in text


def test_serve_benchmark_compares_decoding_and_prompts(capsys, tmp_path):
    argv = ["--no-model", "--layers", "2", "--sequences", "2", "--prompts", "2", "--prompt-tokens", "64"]
    rest = ["--step-ms", "1", "--repeats", "1", "--check", "--plot", str(tmp_path / "serve.png")]
    status = main(["bench", "serve", *argv, *rest])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith((" decode step of 2", " 2 prompts of 64,"))]
    assert [row.split("  ")[0] for row in rows] == [
        " decode step of 2, stored", " 2 prompts of 64, new ones", " 2 prompts of 64, again",
    ]  # fmt: skip
    ratio, _, _, at_least = map(float, rows[0].split()[-4:])
    assert at_least == 0.98
    assert status == (0 if ratio >= 0.975 else 1)
    assert max(map(len, text.splitlines())) <= 80
    assert (tmp_path / "serve.png").read_bytes().startswith(PNG)


def test_first_tokens_are_timed_with_the_prefix_on_the_host():
    """Rounds that store the prefix and load it first are not counted; every counted one is served by it."""
    settings = TtftSettings(prefix_tokens=64, device_bytes=4 << 20, host_bytes=4 << 20, repeats=3)
    prompts = make_prompts(lambda text: [ord(char) % 256 for char in text], settings)
    assert len(prompts) == 5
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 5
    found = compare_ttft(StandInModel(num_layers=2), prompts, settings, lambda line: None)
    assert (len(found.off.seconds), len(found.on.seconds), found.at_least) == (3, 3, 20.0)
    pairs = zip(found.off.seconds, found.on.seconds, strict=True)
    assert found.ratio.values == tuple(off / on for off, on in pairs)


class Answer(Bench):
    """Measures nothing, but shows how long it was told to take."""

    name, summary, description, epilog = "answer", "one figure", "Say what was asked.", ""
    short = ("--number", "42")

    def add_options(self, parser):
        parser.add_argument("--number", type=int, default=1000)

    def measure(self, args, tell):
        tell("thinking")
        return args.number

    def as_json(self, figures):
        return {"number": figures}

    def load_report(self):
        return lambda figures: sys.stdout.write(f"the answer is {figures}\n")

    def load_plot(self):
        return lambda path, figures: path.write_text(f"a plot of {figures}")


@pytest.mark.parametrize(("options", "number"), [((), 42), (("--full",), 1000)])
def test_all_benchmarks_write_figures_and_plots_to_a_folder(capsys, tmp_path, options, number):
    parser = argparse.ArgumentParser()
    add_all(parser.add_subparsers(), [Answer()])
    folder = tmp_path / "new" / "folder"
    args = parser.parse_args(["all", "--output", str(folder), *options])
    assert args.run(args) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"the answer is {number}" in text
    assert f"written to {folder}: answer.json, answer.png" in text
    document = json.loads((folder / "answer.json").read_text())
    assert (document["bench"], document["number"]) == ("answer", number)
    assert "jaxlib" in document["environment"]
    assert (folder / "answer.png").read_text() == f"a plot of {number}"


def test_short_options_are_options_of_their_benchmark():
    for bench in BENCHES:
        parser = argparse.ArgumentParser()
        bench.add_options(parser)
        parser.parse_args(list(bench.short))
