"""Chapter 06 finds a Triton that works here, in any order of imports; without one it says so in a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chapters.aids.triton_anywhere import what_to_do
from chapters.course.catalog import find_chapters
from chapters.course.failures import explain
from chapters.course.running import PLUGINS
from chapters.course.workspace import load_file
from tests.support.kernels import require_kernels

ROOT = Path(__file__).parents[2]
NO_TRITON = """
from functools import partial
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_anything_else(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find(name, path, target)
PathFinder.find_spec = partial(find_anything_else)  # not a function, which others would bind
"""
GENERATE = """
from chapters.ch06_kernels import generate
from tests.support.models import hf_greedy, random_gpt2
model = random_gpt2(seed=5)
assert generate(model, [[1, 2, 3]], 3) == [hf_greedy(model, [1, 2, 3], 3, 96)]
"""


def run(script: str, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A Python of its own, whose environment does not choose between interpreter and compiler."""
    chosen = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    command = [sys.executable, *(options or ("-c", script))]
    return subprocess.run(command, cwd=ROOT, env=chosen | environment, capture_output=True, text=True, timeout=120)


def test_kernels_run_where_triton_was_imported_to_compile() -> None:
    require_kernels("cpu")
    ran = run(f"from transformers import GPT2LMHeadModel\nimport sys\nassert 'triton.language' in sys.modules\n{GENERATE}")
    assert ran.returncode == 0, ran.stderr


def test_without_triton_the_chapter_says_what_to_do() -> None:
    ran = run(NO_TRITON + "import chapters.ch06_kernels")
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and "chapter 06 needs Triton 3.6 or later" in last and "pip install" in last


def test_elsewhere_than_on_linux_the_line_says_where_triton_is() -> None:
    for platform in ("darwin", "win32"):
        line = what_to_do(platform, ImportError("No module named 'triton'"))
        assert "Linux on x86-64" in line and "Docker" in line and "WSL 2" in line and "\n" not in line
    assert "Docker" not in what_to_do("linux", ImportError("No module named 'triton'"))


def test_no_chapter_but_06_needs_triton() -> None:
    names = [chapter.name for chapter in find_chapters() if chapter.number != "06"]
    ran = run(NO_TRITON + "\n".join(f"import chapters.{name}" for name in names))
    assert ran.returncode == 0 and len(names) > 6, ran.stderr


def test_without_triton_the_tests_skip_and_a_check_says_why(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_TRITON, encoding="utf-8")
    shutting_out = os.pathsep.join([str(tmp_path), str(ROOT)])
    tests = ("-m", "pytest", *PLUGINS, "-q", "-rs", "-p", "no:cacheprovider", "tests/chapters/test_ch06_kernels.py")
    ran = run("", *tests, PYTHONPATH=shutting_out)
    assert ran.returncode == 0 and "there is no Triton 3.6 or later" in ran.stdout and " passed" not in ran.stdout, (
        ran.stdout
    )


def test_an_exception_in_a_kernel_is_told_with_its_line(tmp_path: Path) -> None:
    require_kernels("cpu")
    own = tmp_path / "ch06_kernels.py"
    source = (ROOT / "chapters" / "ch06_kernels.py").read_text(encoding="utf-8")
    own.write_text(source.replace("dims = tl.arange(0, PADDED_DIM)", "dims = tl.arange(0, PADDED)", 1), encoding="utf-8")
    chapter = load_file(own, "graded_with_a_typo")
    rows, pool = torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 4, 1, 16)
    with pytest.raises(Exception) as caught:
        chapter.write_kv(*rows, *pool, torch.tensor([1]))
    kind, message, where = explain(caught.value, {own})
    assert (kind, message) == ("raised", "NameError: name 'PADDED' is not defined")
    assert where.startswith("ch06_kernels.py:") and where.endswith("dims = tl.arange(0, PADDED)")
