"""The kernels of chapter 06 compile for a GPU, as its own launches ask for them, without one being there."""

import os
import subprocess
import sys

import pytest

from chapters.course.catalog import ROOT
from tests.support.kernels import why_no_kernels

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of a machine with a GPU, as far as a compilation asks
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
from chapters import ch06_kernels
from chapters.aids import prefill
from tests.support.models import random_gpt2

compiled = set()

class CompileOnly:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel.warmup(*args, grid=tuple(grid), **options)
            compiled.add(self.kernel.__name__)
        return launch

for module in (ch06_kernels, prefill):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, CompileOnly(getattr(module, name)))
for dtype in (torch.float32, torch.bfloat16):
    for heads in (1, 3):
        ch06_kernels.generate(random_gpt2(dtype, n_head=heads, n_layer=1), [[1, 2, 3], [4] * 20], 2)
print(*sorted(compiled))
"""


def test_every_launch_of_chapter_06_compiles() -> None:
    reason = why_no_kernels("cpu")
    if reason is not None and "no Triton" in reason:
        pytest.skip(reason)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == ["decode_kernel", "merge_kernel", "prefill_kernel", "write_kernel"]
