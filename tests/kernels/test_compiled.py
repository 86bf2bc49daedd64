"""What the compiler makes of the kernels, for GPUs that need not be there: they compile, and compile to what was meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagebrain.kernels.version import available

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[90], ids=["hopper"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Kernels by name, each with its ptx and resources."""
    if not available() or not sys.platform.startswith("linux"):
        pytest.skip("there is no Triton 3.6 or later: pip install -r requirements.txt on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", str(request.param)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels: dict[str, dict[str, Any]] = json.loads(ran.stdout)
    return kernels


def test_every_kernel_compiles_and_keeps_its_numbers_in_registers(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) >= 10
    assert {name: kernel["stack_bytes"] for name, kernel in compiled.items() if kernel["stack_bytes"]} == {}


def test_decode_reads_sixteen_bytes_a_lane_and_leaves_room_for_32_warps(compiled: dict[str, dict[str, Any]]) -> None:
    """K and V of a tile are eight loads of 16 bytes; 65,536 registers of a multiprocessor are 32 warps of 64 each."""
    for name in ("decode", "decode float16, half a tile in a block", "decode split", "decode head of 128"):
        kernel = compiled[name]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", kernel["ptx"])) >= 8, name
        assert kernel["registers"] <= 64, name


def test_sampling_reads_sixteen_bytes_a_lane_and_rounds_ranks_as_torch_does(compiled: dict[str, dict[str, Any]]) -> None:
    for name in ("sample best", "sample draw", "sample choose"):
        loads = re.findall(r"ld\.global\S*\.v4\.b32", compiled[name]["ptx"])
        assert len(loads) == (4 if name == "sample choose" else 1), name
        assert ("div.rn.f32" in compiled[name]["ptx"]) == (name != "sample best"), name
    for name, warps in (("sample best", 32), ("sample draw", 32), ("sample choose", 16)):
        assert compiled[name]["registers"] * 32 * warps <= 65_536, name


def test_prefill_computes_on_the_tensor_cores(compiled: dict[str, dict[str, Any]]) -> None:
    for name in ("prefill", "prefill head of 128"):
        assert "wgmma.mma_async" in compiled[name]["ptx"], name
    assert "mma" not in compiled["prefill float32"]["ptx"]  # TF32 would lose what float32 was chosen for
