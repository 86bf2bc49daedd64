"""What a start does not wait for: Hugging Face's modeling code, which takes most of the time of importing it."""

import platform
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers.activations import ACT2FN

from pagebrain.layers.activations import _OWN, find_activation

HEAVY = ("transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo")
GENERATE = """
import sys
from pagebrain import LLM, SamplingParams
outputs = LLM(num_blocks=16).generate(["Once"], SamplingParams(max_tokens=2), use_tqdm=False)
assert len(outputs[0].outputs[0].token_ids) == 2
"""
SERVE = "import sys, pagebrain.server.run, pagebrain.server.link.engine_main"


@pytest.mark.parametrize("program", [GENERATE, SERVE], ids=["generate", "serve"])
def test_safetensors_are_served_without_importing_hugging_faces_models(program: str) -> None:
    told = f"{program}\nprint([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize("name", _OWN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_have_the_bits_of_hugging_faces(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype)
    activate = find_activation(name)
    assert activate is not None and torch.equal(activate(x), ACT2FN[name](x))


def test_what_is_heavy_is_there() -> None:
    assert all(find_spec(name) is not None for name in HEAVY)


def test_other_names_are_looked_up_in_hugging_faces_table() -> None:
    x = torch.linspace(-3, 3, 101)
    activate = find_activation("quick_gelu")
    assert activate is not None and torch.equal(activate(x), ACT2FN["quick_gelu"](x))
    assert find_activation("no_such_function") is None


FAULTS = """
import resource, torch
from pagebrain import LLM
llm = LLM(num_blocks=16)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(3 * 2**18) for _ in range(10)]  # 3 MiB each
        del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's memory")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 10_000, "pages are fetched anew: all of them would be 76,800"
