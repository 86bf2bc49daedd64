"""Every chapter generates what vanilla Hugging Face generates, logit by logit, and its parts serve in the real engine."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

import chapters
from chapters import ch04_scheduler, ch08_sharing
from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.assets import BUNDLED_MODEL
from tests.support.kernels import require_kernels
from tests.support.models import hf_greedy, hf_logits, random_gpt2

Generate = Callable[..., list[list[int]]]
FOLDER = Path(chapters.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("ch*.py"))
PROMPTS = [[1, 2, 3], [7] * 17, [40, 41, 42], list(range(30)), [95]]
KERNELS = "chapters.ch06_kernels"
"""Sums in float32, whatever the model's dtype; and without a GPU is interpreted, which takes its time."""


@pytest.fixture(params=NAMES)
def generate(request: pytest.FixtureRequest) -> Generate:
    name = f"chapters.{request.param}"
    if name == KERNELS:
        require_kernels("cuda" if request.node.get_closest_marker("gpu") else "cpu")
    found: Generate = importlib.import_module(name).generate
    return found


def assert_equal_to_hugging_face(generate: Generate, base: GPT2LMHeadModel, prompts: list[list[int]], count: int) -> None:
    logits: dict[int, list[Tensor]] = {}
    count, atol = (min(count, 6), 1e-4) if generate.__module__ == KERNELS else (count, 1e-9)
    answers = generate(base, prompts, count, lambda index, scores: logits.setdefault(index, []).append(scores.clone()))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer == hf_greedy(base, prompt, count, cast(int, base.config.eos_token_id))
        expected = hf_logits(base, prompt + answer)[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(logits[index]), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [{}, {"n_head": 1, "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False, "n_inner": 20}],
    ids=["plain", "one head", "unscaled"],
)
def test_logits_and_tokens_equal_hugging_face(generate: Generate, shape: dict[str, Any]) -> None:
    assert_equal_to_hugging_face(generate, random_gpt2(seed=5, **shape), PROMPTS, 20)


def test_an_answer_ends_with_the_end_of_sequence(generate: Generate) -> None:
    base = random_gpt2(seed=5)
    base.config.eos_token_id = hf_greedy(base, PROMPTS[1], 6)[-1]
    assert_equal_to_hugging_face(generate, base, PROMPTS, 20)
    assert any(len(answer) < 20 for answer in generate(base, PROMPTS, 20 if generate.__module__ != KERNELS else 7))


def test_stories_equal_hugging_face(generate: Generate) -> None:
    base = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    prompts = [tokenizer.encode(text) for text in ("One morning Mia", "Once upon a time, in the old mill,")]
    assert_equal_to_hugging_face(generate, base, prompts, 40)


def test_no_prompts_give_no_answers(generate: Generate) -> None:
    assert generate(random_gpt2(), [], 5) == []


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 5, "prompt 1 is empty"),
        ([[97]], 5, "outside 0..96"),
        ([[1] * 60], 5, "need 65 positions"),
        ([[1]], 0, "at least 1"),
    ],
    ids=["empty", "token", "too long", "no tokens"],
)
def test_bad_input_is_refused(generate: Generate, prompts: list[list[int]], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(random_gpt2(), prompts, count)


def test_the_scheduler_preempts_when_blocks_run_out_and_mixes_prefill_with_decode() -> None:
    base = random_gpt2(seed=5)
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=8)
    engine = ch04_scheduler.Engine(base, config)
    sequences = [engine.add_request(prompt, 20) for prompt in PROMPTS]
    while engine.step() is not None:
        pass
    assert [seq.output_token_ids for seq in sequences] == [hf_greedy(base, prompt, 20, 96) for prompt in PROMPTS]
    assert any(trace.preempted for trace in engine.history)
    assert any({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in engine.history)
    assert engine.cache.num_free_blocks == 14


def test_chapter_08_finds_prompts_evicts_and_preempts() -> None:
    base = random_gpt2(seed=5)
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=13, max_num_seqs=3, max_num_batched_tokens=8)
    engine = ch08_sharing.Engine(base, config)
    prompts = [[*range(20), 50 + number, 60] for number in range(6)]
    sequences = [engine.add_request(prompt, 12) for prompt in prompts]
    while engine.step() is not None:
        pass
    assert [seq.output_token_ids for seq in sequences] == [hf_greedy(base, prompt, 12, 96) for prompt in prompts]
    first = {row.seq_id: row.start for trace in reversed(engine.history) for row in trace.rows}
    assert max(first.values()) == 20 and any(trace.shared_blocks for trace in engine.history)
    assert any(trace.preempted for trace in engine.history)
    assert engine.cache.block_manager.num_evicted > 0 and engine.cache.num_free_blocks == 13


PARTS = {
    "block_manager": "ch02_block_table.py:BlockManager",
    "attention": "ch03_paged_attention.py:paged_attention",
    "scheduler": "ch04_scheduler.py:Scheduler",
}


@pytest.mark.parametrize("parts", [[name] for name in PARTS] + [list(PARTS)], ids=[*PARTS, "all"])
def test_a_chapters_part_serves_in_the_engine(parts: list[str]) -> None:
    base = random_gpt2(seed=5)
    named = {part: f"{FOLDER}/{PARTS[part]}" for part in parts}
    llm = LLM(base, block_size=4, num_blocks=16, parts=named, check_integrity=True)
    params = SamplingParams(temperature=0, max_tokens=20)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outputs] == [hf_greedy(base, prompt, 20, 96) for prompt in PROMPTS]
    assert sum(out.metrics.num_preemptions for out in outputs) > 0
    assert llm.engine.cache_manager.num_free_blocks == 16


def test_the_kernels_serve_in_the_engine() -> None:
    """With chunks so small that prompts and decodes meet in one step, and after a preemption."""
    require_kernels("cpu")
    base = random_gpt2(torch.float32, seed=5)
    prompts = [[1, 2, 3], [7] * 9, [95]]
    named = {"attention": f"{FOLDER}/ch06_kernels.py:paged_attention"}
    settings: dict[str, Any] = {"block_size": 4, "num_blocks": 5, "max_num_batched_tokens": 8, "check_integrity": True}
    llm = LLM(base, parts=named, **settings)
    traces: list[Any] = []
    llm.engine.observers.append(traces.append)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=7), use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outputs] == [hf_greedy(base, prompt, 7, 96) for prompt in prompts]
    assert any({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in traces)
    assert sum(out.metrics.num_preemptions for out in outputs) > 0


@pytest.mark.gpu
def test_stories_on_a_gpu_equal_hugging_face_on_the_cpu(generate: Generate) -> None:
    base = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    prompts = [tokenizer.encode(text) for text in ("One morning Mia", "Once upon a time, in the old mill,")]
    expected = [hf_greedy(base, prompt, 40, tokenizer.eos_token_id) for prompt in prompts]
    assert generate(base.to("cuda"), prompts, 40) == expected


def test_the_command_serves_with_a_chapters_parts_and_with_a_learners_file(tmp_path: Path) -> None:
    """As its users start it: a console script, whose path does not lead to the chapters."""
    root = FOLDER.parent
    own = tmp_path / "work" / "ch04_scheduler.py"
    own.parent.mkdir()
    own.write_text((FOLDER / "ch04_scheduler.py").read_text(encoding="utf-8"), encoding="utf-8")
    parts = {**{part: f"chapters/{name}" for part, name in PARTS.items()}, "scheduler": f"{own}:Scheduler"}
    named = [word for part, name in parts.items() for word in ("--part", f"{part}={name}")]
    command = ["generate", "One morning", "--temperature", "0", "--max-tokens", "8", "--check-integrity"]
    script = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(root)!r})] + [{str(tmp_path / 'lib')!r}]\n"
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pagebrain").symlink_to(root / "pagebrain")
    script += "from pagebrain.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answers = [
        subprocess.run(
            [sys.executable, "-c", script, *command, *more], cwd=root, env=environment, capture_output=True, text=True
        )
        for more in (named, [])
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != ""
