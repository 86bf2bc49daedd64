"""``pagebrain doctor``: checks this machine for what the engine needs, and says what to do about each lack.

It must work where the rest of PageBrain does not. So imports are inside the checks, and a check that fails is a finding.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pagebrain import __version__
from pagebrain.machine import available_cores, available_memory

NUM_TOKENS = 24
"""Tokens that the bundled model generates for the comparison with Hugging Face."""

_MARKS = {"ok": "ok", "absent": "-", "broken": "BROKEN"}
_STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``absent``: the engine works without it. ``broken``: the engine needs it."""

    name: str
    state: Literal["ok", "absent", "broken"]
    found: str
    advice: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run all checks and print the findings. Returns 0 if the engine can run and 1 if not."""
    findings = [finding for check in CHECKS for finding in _attempt(check)]
    can_run = all(finding.state != "broken" for finding in findings)
    if args.json:
        report = {"pagebrain": __version__, "engine_can_run": can_run, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    elif importlib.util.find_spec("rich") is None:
        _print_plain(findings)
    else:
        _print_table(findings, can_run)
    return 0 if can_run else 1


def _attempt(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a check. An unexpected exception is a finding too."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        findings.append(Finding(name, "broken", found, "install PageBrain again, with the packages of requirements.txt"))
    return findings


def check_python() -> Iterator[Finding]:
    """The interpreter and the machine."""
    version, wanted = platform.python_version(), (3, 10)
    good = sys.version_info[:2] >= wanted
    yield Finding("Python", "ok" if good else "broken", version, None if good else "install Python 3.10 or later")
    yield Finding("platform", "ok", f"{platform.system()} {platform.machine()}")
    yield Finding("memory", "ok", str(available_memory()))


def check_packages() -> Iterator[Finding]:
    """The libraries that the engine needs."""
    for package in ("torch", "transformers", "tokenizers", "safetensors", "rich"):
        yield _package(package, "broken", "")


def check_server() -> Iterator[Finding]:
    """The libraries that ``pagebrain serve`` needs."""
    for package in ("fastapi", "uvicorn", "httptools", "prometheus-client"):
        yield _package(package, "absent", "pagebrain serve needs it: ")


def _package(name: str, if_missing: Literal["absent", "broken"], reason: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, if_missing, "not installed", f"{reason}pip install {name}")


def check_device() -> Iterator[Finding]:
    """Processors and GPUs."""
    import torch

    from pagebrain.devices import limit_threads

    yield Finding("CPU threads", "ok", f"{limit_threads()} used by torch, {available_cores()} processors for this process")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        yield Finding("GPU", "ok", ", ".join(names))
    elif torch.version.cuda is None:
        advice = "not needed: the engine runs on the CPU; with an NVIDIA GPU install a CUDA build of torch (pytorch.org)"
        yield Finding("GPU", "absent", "none: this build of torch has no CUDA", advice)
    else:
        advice = "not needed: the engine runs on the CPU; if there is an NVIDIA GPU, check that nvidia-smi lists it"
        yield Finding("GPU", "absent", "none: torch finds no CUDA GPU", advice)


def check_kernels() -> Iterator[Finding]:
    """The implementations that the engine will use."""
    import torch

    from pagebrain.attention import choose_backend
    from pagebrain.attention.triton_backend import TritonBackend
    from pagebrain.layers.linear import can_pack

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = choose_backend(None, device, torch.bfloat16, 64)
    found = "Triton kernels" if isinstance(backend, TritonBackend) else "torch operations"
    yield Finding("paged attention", "ok", found, reason)
    if can_pack(torch.float32, torch.device("cpu")):
        yield Finding("packed weights", "ok", "oneDNN packs float32 weights on the CPU")
    else:
        advice = "the engine runs, only slower on the CPU; official x86 builds of torch have oneDNN"
        yield Finding("packed weights", "absent", "this build of torch cannot pack weights with oneDNN", advice)
    if importlib.util.find_spec("triton") is not None:
        yield Finding("Triton", "ok", importlib.metadata.version("triton"))
    else:
        advice = "not needed on a CPU; on Linux with an NVIDIA GPU: pip install triton"
        yield Finding("Triton", "absent", "not installed", advice)


def check_bundled_model() -> Iterator[Finding]:
    """The bundled model: it can be read, and its tokens are equal to Hugging Face's."""
    import torch

    from pagebrain import LLM, PageBrainConfig, PageBrainError, SamplingParams
    from pagebrain.assets import BUNDLED_MODEL
    from pagebrain.models.loading import load_model

    advice = "the package is incomplete: install PageBrain again"
    try:
        base = load_model(PageBrainConfig(dtype="float32"))
        llm = LLM(dtype="float32")
    except PageBrainError as error:
        yield Finding("bundled model", "broken", str(error), advice)
        return
    num_bytes = sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir())
    size = f"{base.num_parameters() / 1e6:.2f} M parameters, {num_bytes / 1e6:.1f} MB on disk"
    yield Finding("bundled model", "ok", f"{size}, in {BUNDLED_MODEL}")

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    output = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    prompt = torch.tensor([output.prompt_token_ids], device=base.device)
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": NUM_TOKENS,
        "max_new_tokens": NUM_TOKENS,
        "pad_token_id": 0,
    }
    hugging_face: Any = base  # the types of generate() do not accept its own class
    answer = hugging_face.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    expected, got = answer[0, prompt.shape[1] :].tolist(), list(output.outputs[0].token_ids)
    if got == expected:
        yield Finding("engine", "ok", f"{NUM_TOKENS} greedy tokens equal to Hugging Face's generate")
    else:
        found = f"the engine generated {got}, Hugging Face {expected}"
        yield Finding("engine", "broken", found, "please report this with the output of pagebrain doctor --json")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_server,
    check_device,
    check_kernels,
    check_bundled_model,
)


def _print_table(findings: list[Finding], can_run: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"PageBrain {__version__}", title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.advice is not None:
            found.append(f"\n{finding.advice}", style="italic")
        table.add_row(Text(_MARKS[finding.state], style=_STYLES[finding.state]), finding.name, found)
    console = Console(highlight=False)
    console.print(table)
    console.print("The engine can run here." if can_run else "The engine cannot run here: see the lines marked BROKEN.")


def _print_plain(findings: list[Finding]) -> None:
    for finding in findings:
        print(
            f"{_MARKS[finding.state]:<7}{finding.name}: {finding.found}" + (f" ({finding.advice})" if finding.advice else "")
        )
