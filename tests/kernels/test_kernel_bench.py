"""``pagebrain bench kernels``: what it counts, what it shows, and what it says where there is no GPU."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pagebrain.bench import kernel_bench
from pagebrain.bench.kernel_bench import (
    InputSets,
    KernelBench,
    Shape,
    add_kernels_arguments,
    draw_roofline,
    print_kernel_report,
    roof,
    run_kernels,
)
from pagebrain.cli import main
from pagebrain.errors import ConfigError, PageBrainError

GPT2 = Shape(num_heads=12, num_kv_heads=12, head_dim=64, block_size=16, itemsize=2)


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_kernels_arguments(parser)
    return parser.parse_args(line)


def test_bytes_and_operations_are_those_of_the_formula() -> None:
    """A token of GPT-2 small takes 36,864 bytes over 12 layers; a causal prompt sees half of the square."""
    assert GPT2.kv_bytes(1, 1) * 12 == 36_864
    assert GPT2.flops(2, 1, 512) == 2 * 12 * 2 * (2 * 64 * 512)
    assert GPT2.flops(1, 3, 3) == 12 * 4 * 64 * (1 + 2 + 3)
    assert GPT2.flops(1, 2, 10) == 12 * 4 * 64 * (9 + 10)
    grouped = Shape(num_heads=12, num_kv_heads=3, head_dim=64, block_size=16, itemsize=2)
    assert grouped.kv_bytes(5, 7) * 4 == GPT2.kv_bytes(5, 7) and grouped.flops(5, 1, 7) == GPT2.flops(5, 1, 7)


def test_sets_of_inputs_share_no_block() -> None:
    sets = InputSets(GPT2, torch.float32, "cpu", 3, 2, 1, 20, arguments("--max-model-len", "64"))
    used = sets.tables[:, :, :2].flatten().tolist()
    assert sorted(used) == list(range(3 * 2 * 2))
    assert sets.tables.shape == (3, 2, 4) and sets.pools[0].shape == (12, 16, 12, 64)
    assert sets.pools[0].stride() == (12 * 16 * 64, 64, 16 * 64, 1)


def test_the_roof_is_memory_before_the_ridge_and_arithmetic_after_it() -> None:
    assert roof(1.0, 4e12, 800e12) == 4e12
    assert roof(1000.0, 4e12, 800e12) == 800e12


def measured() -> dict[str, Any]:
    """What a run might have found: a decode step near the roof of memory, and a prompt under that of arithmetic."""
    row = {"num_seqs": 256, "query_len": 1, "context_len": 512, "seconds": 94e-6, "flops_per_s": 4.3e12, "intensity": 1.0}
    decode = row | {"kv_bytes": 402_653_184, "kv_bytes_per_s": 4.28e12, "share_of_copy": 1.005}
    prefill = row | {"query_len": 512, "flops_per_s": 200e12, "intensity": 256.0}
    return {
        "shape": vars(GPT2) | {"dtype": "bfloat16"},
        "versions": {"gpu": "NVIDIA H200"},
        "replays": 20,
        "copy_bytes_per_s": 4.26e12,
        "product_flops_per_s": 790e12,
        "decode": [decode],
        "prefill": [prefill],
    }


def test_every_measured_row_is_in_the_table_with_its_share_of_the_roof() -> None:
    console = Console(record=True, width=140, file=open("/dev/null", "w"))
    print_kernel_report(measured(), console)
    text = console.export_text()
    for part in (
        "NVIDIA H200",
        "4.26 TB/s",
        "ridge is at 185",
        "94.0 us",
        "402.7 MB",
        "4.28",
        "100%",
        "200.0",
        "101%",
        "25%",
    ):
        assert part in text, part


def test_the_chart_is_the_roofline_of_the_same_rows(tmp_path: Path) -> None:
    draw_roofline(measured(), tmp_path / "roofline.svg")
    text = (tmp_path / "roofline.svg").read_text(encoding="utf-8")
    for part in ("NVIDIA H200", "decode of 256", "prefill", "ridge: 185"):
        assert part in text, part


def small_bench(monkeypatch: pytest.MonkeyPatch, device: str) -> KernelBench:
    """A bench of tiny shapes whose clock says that every launch takes a microsecond."""
    monkeypatch.setattr(kernel_bench, "measure_copy", lambda device: 2048 / 1e-6)
    monkeypatch.setattr(kernel_bench, "_PRODUCT_SIZE", 8)
    monkeypatch.setattr(kernel_bench, "_PREFILLS", ((2, 9),))
    bench = object.__new__(KernelBench)
    bench.args = arguments("--max-model-len", "64")
    bench.shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16, block_size=8, itemsize=4)
    bench.batches, bench.contexts, bench.l2_bytes = [1, 3], [20], 1
    bench.dtype, bench.device = torch.float32, torch.device(device)
    monkeypatch.setattr(bench, "time", lambda launch, num_sets: 1e-6 * bool([launch(index) for index in range(num_sets)]))
    return bench


def test_every_shape_is_checked_and_counted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = small_bench(monkeypatch, device).run()
    assert [(row["num_seqs"], row["context_len"]) for row in report["decode"]] == [(1, 20), (3, 20)]
    assert [row["kv_bytes"] for row in report["decode"]] == [2 * 20 * 16 * 4, 3 * 2 * 20 * 16 * 4]
    assert report["decode"][0]["share_of_copy"] == pytest.approx(2560 / 2048)
    assert report["prefill"][0]["flops_per_s"] == pytest.approx(2 * 2 * 4 * 16 * 45 / 1e-6)
    assert 0 < max(row["relative_error"] for row in report["decode"] + report["prefill"]) < 1e-5
    assert report["versions"]["triton"] and report["date"].endswith("+00:00")
    print_kernel_report(report, Console(file=open("/dev/null", "w")))
    assert json.dumps(report)


def test_wrong_kernels_are_not_timed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagebrain.kernels import paged

    bench = small_bench(monkeypatch, device)
    right: Any = paged.paged_attention
    monkeypatch.setattr(paged, "paged_attention", lambda *args, **options: right(*args, **options) * 1.01)
    with pytest.raises(PageBrainError, match="differs from the torch path by 0.01: the kernels are wrong on this machine"):
        bench.run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "torch finds none here" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--batch", "1,x"], "--batch takes positive numbers"),
        (["--context", "0"], "--context takes positive numbers"),
        (["--context", "2048"], "use --max-model-len 2048"),
        (["--heads", "0"], "--heads must be at least 1"),
        (["--dtype", "int8"], "--dtype knows"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
        (["--chart", "/nowhere/at/all.png"], "--chart /nowhere/at/all.png cannot be written"),
        (["--chart", "roofline.txt"], "--chart must name a .png or .svg file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(line: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_kernels(arguments(*line))


@pytest.mark.gpu
def test_a_small_run_measures_what_it_promises(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    file = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--batch", "2", "--context", "64", "--replays", "3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["date"] and report["command"] and report["versions"]["triton"] and report["copy_bytes_per_s"] > 1e11
    (row,) = report["decode"]
    assert row["kv_bytes_per_s"] * row["seconds"] == pytest.approx(2 * 2 * 64 * 12 * 64 * 2)
