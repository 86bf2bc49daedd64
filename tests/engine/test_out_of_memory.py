"""Too little memory is told as such, in one line, at start and in a step; what torch says comes from its real allocator."""

import re
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch

from pagebrain import LLM, SamplingParams, build
from pagebrain.cli import main
from pagebrain.errors import ConfigError, ModelLoadError, StepError, is_out_of_memory
from pagebrain.layers import linear
from pagebrain.layers.linear import EXACT_ROWS, can_pack, padded_rows
from pagebrain.models import checkpoints
from pagebrain.models.weights import SavedTensors
from pagebrain.server.link.engine_main import kind_and_place
from tests.support.models import random_gpt2

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def take_too_much(*_: Any, **__: Any) -> Any:
    """What torch's allocator for CPUs raises when the system has no memory: 4 exabytes are not there."""
    return torch.empty(2**60, dtype=torch.float32)


def test_what_libraries_say_of_too_little_memory_is_known_and_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as raised:
        take_too_much()
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    for other in (RuntimeError("out of luck"), ValueError("out of memory"), OSError(2, "no such file"), ImportError("no x")):
        assert not is_out_of_memory(other)
    wrapped = ModelLoadError("the weights could not be read")
    wrapped.__cause__ = raised.value
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("load_text", "the tokenizer"),
        ("open_checkpoint", "the model's weights"),
        ("build_model", "the model's weights"),
        ("CacheManager", "K and V in 8 blocks"),
        ("prepare", "a copy of the weights in another layout"),
        ("TorchExecutor", "the tokens of all sequences"),
    ],
)
def test_too_little_memory_at_start_is_one_line_that_says_what_for(
    place: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, place, take_too_much)
    with pytest.raises(ConfigError, match=rf"there is not enough memory for {what}.* GB free of .* GB") as raised:
        LLM(num_blocks=8, dtype="float32", device="cpu")
    assert is_out_of_memory(raised.value)
    capsys.readouterr()
    assert main(["generate", "Once", "--num-blocks", "8", "--device", "cpu"]) == 2
    assert re.fullmatch(r"pagebrain: error: there is not enough memory for [^\n]*\n", capsys.readouterr().err)


def test_too_little_memory_for_weights_is_told_although_the_loader_wraps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "is_whole", lambda *_: False)  # so that Hugging Face reads them
    monkeypatch.setattr("transformers.GPT2LMHeadModel.from_pretrained", take_too_much)
    with pytest.raises(ConfigError, match="there is not enough memory for the model's weights"):
        LLM(device="cpu")


def test_too_little_memory_for_a_tensor_that_is_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SavedTensors, "__getitem__", take_too_much)
    with pytest.raises(ConfigError, match="there is not enough memory for the model's weights"):
        LLM(device="cpu")


def test_too_little_memory_elsewhere_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LLM, "__init__", take_too_much)
    assert main(["generate", "Once"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pagebrain: error: not enough memory: ") and error.count("\n") == 1


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_too_little_memory_in_a_step_is_told_and_nothing_is_lost(async_scheduling: bool) -> None:
    base = random_gpt2()
    prompts = [[1, 2, 3], [4], [5] * 20]
    expected = LLM(base, num_blocks=16).generate(prompts, GREEDY, use_tqdm=False)
    engine = LLM(base, num_blocks=16, async_scheduling=async_scheduling).engine
    model: Any = engine.executor.model  # type: ignore[attr-defined]
    forward, calls = model.forward_tokens, 0

    def sometimes(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return take_too_much() if calls in (2, 5) else forward(batch)

    model.forward_tokens = sometimes
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, GREEDY, str(index))
    finished: dict[str, Any] = {}
    failures: list[StepError] = []
    while engine.has_unfinished_requests:
        try:
            finished.update((d.request_id, d.finished) for d in engine.step() if d.finished is not None)
        except StepError as error:
            failures.append(error)
            engine.check_integrity()
    assert failures and all("failed: out of memory (lower max_num_batched_tokens" in str(error) for error in failures)
    assert all(re.fullmatch(r"out of memory: RuntimeError \(.*\)", kind_and_place(error)) for error in failures)
    for index, output in enumerate(expected):
        assert finished[str(index)].outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("command", [["generate", "Once"], ["serve", "--port", "0"], ["doctor"]])
def test_a_small_ulimit_v_is_one_line_that_speaks_of_memory(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pagebrain", *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (800_000_000, 800_000_000)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(
        r"pagebrain: error: not enough memory: 0.\d+ GB free of 0.80 GB \(ulimit -v\): [^\n]*\n", run.stderr
    ), run.stderr


# Shapes ---------------------------------------------------------------------------------------------------------------


def test_few_numbers_of_rows_are_computed_and_little_is_added() -> None:
    padded = {rows: padded_rows(rows) for rows in range(16_385)}
    assert all(padded[rows] == rows for rows in range(EXACT_ROWS + 1))
    assert all(rows <= padded[rows] <= rows * 17 / 16 for rows in padded)
    assert all(padded_rows(rows) == rows for rows in padded.values())
    assert len({padded[rows] for rows in range(1, 513)}) == 112 and len(set(padded.values())) == 193


@pytest.mark.skipif(not can_pack(torch.float32, torch.device("cpu")), reason="this torch cannot pack weights")
def test_packed_products_are_computed_in_few_shapes_and_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps memory for each number of rows that it meets."""
    shapes: set[int] = set()
    tokens: set[int] = set()
    product = linear._packed_product

    def noted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.add(x.shape[0])
        return product(x, *args)

    monkeypatch.setattr(linear, "_packed_product", noted)
    llm = LLM(num_blocks=128, device="cpu", dtype="float32")
    assert llm.weights_packed
    llm.engine.observers.append(lambda trace: tokens.add(sum(row.num_tokens for row in trace.rows)))
    prompts = [[(7 * i + length) % 2000 for i in range(length)] for length in (70, 150, 211, 300, 333, 1)]
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    packed = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    assert {70, 150, 211, 300, 333} <= tokens  # these are no numbers of rows that are computed
    assert shapes == {padded_rows(rows) for rows in shapes} and len(shapes) > 5
    monkeypatch.setattr(build, "prepare", lambda *_, **__: None)
    plain = LLM(num_blocks=128, device="cpu", dtype="float32")
    for output, expected in zip(packed, plain.generate(prompts, params, use_tqdm=False)):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.prompt_logprobs is not None and expected.prompt_logprobs is not None
        for found, wanted in zip(output.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert found is not None and wanted is not None
            assert found.logprob == pytest.approx(wanted.logprob, abs=1e-3)
