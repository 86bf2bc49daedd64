"""What the engine did before the restructuring, recorded, and what it does now: equal, to the bit.

Kept for the time of the restructuring only, and for one machine: logits are compared as bytes, which another CPU or another
version of torch rounds otherwise. A scene is a model, settings and requests. Of each scene are recorded the plans (which
tokens of which sequences in which step, and their block tables), the logits of every forward call, and all that comes out of
the engine. Numbers stand in the file as digests, with tokens, texts and a few numbers beside them that say what differs.

``TRITON_INTERPRET=1 python -m tests.engine.test_recorded_behaviour`` records anew.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from pagebrain import LLM, SamplingParams
from pagebrain.engine.trace import StepTrace
from tests.support.kernels import why_no_kernels
from tests.support.models import poison, random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

FILE = Path(__file__).parent / "recorded_behaviour.json"

SHARED: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
LATE: dict[str, Any] = {"min_tokens": 3, "logit_bias": {66: 7.0}, "seed": 13}
PARAMS: list[dict[str, Any]] = [
    SHARED | {"temperature": 0},
    SHARED | {"temperature": 0.8, "seed": 1},
    SHARED | {"temperature": 1.2, "top_p": 0.7, "seed": 2},
    SHARED | {"temperature": 0.9, "top_k": 5, "seed": 3},
    SHARED | {"temperature": 0.9, "min_p": 0.05, "seed": 4},
    SHARED | {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "n": 3},
    SHARED | {"temperature": 0, "repetition_penalty": 1.4},
    SHARED | {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    SHARED | {"temperature": 0, "frequency_penalty": 2.0, "logprobs": 2},
    SHARED | {"temperature": 0, "logit_bias": {65: 4.0, 66: 3.5, 10: -100.0}},
    SHARED | {"temperature": 0, "logprobs": 0, "prompt_logprobs": 0},
    SHARED | {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 2, "n": 2, "seed": 9},
    SHARED | {"temperature": 0.9, "stop_token_ids": list(range(0, 256, 7)), "min_tokens": 4},
    SHARED | {"temperature": 0.9, "stop_token_ids": list(range(0, 256, 7)), "include_stop_str_in_output": True},
    SHARED | {"temperature": 2.0, "stop": [*"aeiou0135", "xy"], "logit_bias": {68: 7.0}, "seed": 12, "n": 2},
    SHARED | {"temperature": 2.0, "stop": [*"bcdfgh246"], "include_stop_str_in_output": True} | LATE,
    {"temperature": 3.0, "max_tokens": 20, "logit_bias": {256: 4.0}, "min_tokens": 2, "seed": 14, "n": 2},
    {"temperature": 0, "max_tokens": 20, "logit_bias": {256: 9.0}, "min_tokens": 5, "skip_special_tokens": False},
    {"temperature": 0, "ignore_eos": True},  # to the last position
    SHARED | {"temperature": 0, "max_tokens": 1},
]
"""Every field of ``SamplingParams``. Prompts have other lengths, one token among them."""

PROMPTS = [[(7 * i + 13 * j) % 256 for j in range(1 + 5 * i % 23)] for i in range(len(PARAMS))]
SHORT = {"max_tokens": 5}
"""Kernels in Triton's interpreter take a thousand times as long."""
FOR_KERNELS = [PARAMS[index] | SHORT for index in (0, 2, 6, 10, 11, 12, 17)]

KERNELS = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}

ROOMY: dict[str, Any] = {"block_size": 4, "num_blocks": 400, "max_num_seqs": 32}
CHUNKS: dict[str, Any] = {"block_size": 4, "num_blocks": 120, "max_num_seqs": 5, "max_num_batched_tokens": 7}
TIGHT: dict[str, Any] = {"block_size": 4, "num_blocks": 18, "max_num_seqs": 6, "max_num_batched_tokens": 16}
FEW_SEATS: dict[str, Any] = {"block_size": 8, "num_blocks": 30, "max_num_seqs": 2, "max_num_batched_tokens": 8}


def small(dtype: torch.dtype = torch.float64, **settings: Any) -> GPT2LMHeadModel:
    ends: dict[str, Any] = {"bos_token_id": VOCAB_SIZE - 1, "eos_token_id": VOCAB_SIZE - 1}
    return random_gpt2(dtype, seed=21, vocab_size=VOCAB_SIZE, initializer_range=0.3, **(ends | settings))


def plain(**settings: Any) -> Callable[[], LLM]:
    return lambda: LLM(small(), byte_tokenizer(), **settings)


def kernels(**settings: Any) -> Callable[[], LLM]:
    return lambda: LLM(small(torch.float32, n_embd=16, n_head=1, n_layer=1), byte_tokenizer(), parts=KERNELS, **settings)


def scaled_by_layer() -> LLM:
    flags: dict[str, Any] = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_layer": 3}
    return LLM(small(**flags), byte_tokenizer(), **CHUNKS)


SCENES: dict[str, tuple[Callable[[], LLM], list[dict[str, Any]]]] = {
    "roomy": (plain(**ROOMY), PARAMS),
    "chunks": (plain(**CHUNKS), PARAMS),
    "preemption": (plain(**TIGHT), PARAMS),
    "ahead": (plain(async_scheduling=True, **ROOMY), PARAMS),
    "ahead in chunks": (plain(async_scheduling=True, **CHUNKS), PARAMS),
    "ahead with preemption": (plain(async_scheduling=True, **TIGHT), PARAMS),
    "scaled by layer": (scaled_by_layer, PARAMS),
    "bundled model": (lambda: LLM(device="cpu", num_blocks=64, block_size=8), PARAMS[:12]),
    "kernels": (kernels(**FEW_SEATS), FOR_KERNELS),
    "kernels ahead with preemption": (
        kernels(async_scheduling=True, **(FEW_SEATS | {"num_blocks": 5, "block_size": 4})),
        FOR_KERNELS,
    ),
}


class Watched:
    """Digests of what an engine does while it serves requests."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.plans, self.logits = hashlib.sha256(), hashlib.sha256()
        self.some_logits: list[float] = []
        self.num_steps = self.num_tokens = self.num_preempted = 0
        llm.engine.observers.append(self._note_plan)
        model: Any = llm.engine.executor.model  # type: ignore[attr-defined]
        self._forward = model.forward_tokens
        model.forward_tokens = self._noted_forward

    def _note_plan(self, trace: StepTrace) -> None:
        rows = [(row.seq_id, row.start, row.num_tokens, row.samples) for row in trace.rows]
        plan = (rows, sorted(trace.block_tables.items()), trace.free_blocks, trace.preempted, trace.finished)
        self.plans.update(repr(plan).encode())
        self.num_steps += 1
        self.num_tokens += trace.num_tokens
        self.num_preempted += len(trace.preempted)

    def _noted_forward(self, batch: Any) -> Any:
        logits = self._forward(batch)
        self.logits.update(logits.contiguous().numpy().tobytes())
        if len(self.some_logits) < 8 and len(logits):
            self.some_logits += logits[-1, :2].tolist()
        return logits


def observed(scene: str) -> dict[str, Any]:
    """All that is recorded of a scene."""
    make, params = SCENES[scene]
    llm = make()
    poison(llm.engine.cache_manager.pool)
    watched = Watched(llm)
    engine, outputs = llm.engine, {}
    deltas = hashlib.sha256()
    prompts = [prompt[-12:] for prompt in PROMPTS] if scene.startswith("kernels") else PROMPTS
    names = [f"request-{index}" for index in range(len(params))]
    for name, prompt, wanted in zip(names[:-2], prompts, params, strict=False):
        engine.add_request(prompt, SamplingParams(**wanted), name)
    for step in itertools.count():
        if step == 3:  # two come late, and one leaves
            for index in (-2, -1):
                engine.add_request(prompts[index], SamplingParams(**params[index]), names[index])
            engine.abort(names[1])
        if not engine.has_unfinished_requests:
            break
        for delta in engine.step():
            deltas.update(repr(delta[:8]).encode())
            if delta.finished is not None:
                outputs[delta.request_id] = delta.finished
    assert engine.cache_manager.num_free_blocks == llm.config.num_blocks
    assert sorted(outputs) == sorted(name for name in names if name != names[1])
    ended = [(outputs[name].outputs, outputs[name].prompt_logprobs) for name in names if name in outputs]
    return {
        "steps, tokens, preemptions": [watched.num_steps, watched.num_tokens, watched.num_preempted],
        "plans": watched.plans.hexdigest(),
        "some logits": watched.some_logits,
        "logits": watched.logits.hexdigest(),
        "deltas": deltas.hexdigest(),
        "outputs": hashlib.sha256(repr(ended).encode()).hexdigest(),
        "samples": [
            [list(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason, sample.cumulative_logprob]
            for samples, _ in ended
            for sample in samples
        ],
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads would add the same numbers in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """What the bits of a result depend on: torch, and the processor. Elsewhere there is nothing to compare with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kinds = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found = dict(line.split("\t:", 1)[0:2] for line in (line.replace("\t\t:", "\t:") for line in lines) if "\t:" in line)
    processor = ", ".join(found.get(kind, "?").strip() for kind in kinds)
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


@pytest.mark.parametrize("scene", SCENES)
def test_is_what_it_was(scene: str) -> None:
    recorded = json.loads(FILE.read_text())
    if recorded["machine"] != machine():
        pytest.skip(f"recorded on {recorded['machine']}; this is {machine()}")
    if scene.startswith("kernels") and (reason := why_no_kernels("cpu")) is not None:
        pytest.skip(reason)
    with one_thread():
        now = json.loads(json.dumps(observed(scene)))
    assert now == recorded[scene]
    assert (now["steps, tokens, preemptions"][2] > 0) == ("preemption" in scene)


def record() -> None:
    with one_thread():
        scenes = {scene: observed(scene) for scene in SCENES}
    lines = [f"{json.dumps(name)}: {json.dumps(seen)}" for name, seen in ({"machine": machine()} | scenes).items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
