"""Chapter 07 where it is meant to run: real CUDA graphs, launched ahead, against Hugging Face; and what a graph refuses."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chapters import ch07_full_speed
from chapters.aids.capture import CaptureError, Download, capture, upload
from pagebrain import PageBrainConfig
from tests.support.models import hf_greedy, hf_logits, poison, random_gpt2

PROMPTS = [[1, 2, 3], [7] * 17, [40, 41, 42], list(range(30)), [95]]
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.gpu
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
def test_logits_and_tokens_on_a_gpu_equal_hugging_face_under_preemption(async_scheduling: bool, use_graphs: bool) -> None:
    base: Any = random_gpt2(seed=5)
    expected = [hf_greedy(base, prompt, 20, 96) for prompt in PROMPTS]
    expected_logits = [
        hf_logits(base, [*prompt, *answer])[len(prompt) - 1 : -1] for prompt, answer in zip(PROMPTS, expected, strict=True)
    ]
    base.cuda()
    settings = {"block_size": 4, "num_blocks": 14, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    config = PageBrainConfig.for_model(base, async_scheduling=async_scheduling, **settings)
    logits: dict[int, list[Tensor]] = {}
    engine = ch07_full_speed.Engine(
        base, config, lambda index, scores: logits.setdefault(index, []).append(scores), use_graphs=use_graphs
    )
    poison(engine.cache)
    sequences = [engine.add_request(prompt, 20) for prompt in PROMPTS]
    most_in_flight = 0
    while engine.step() is not None:
        most_in_flight = max(most_in_flight, len(engine.in_flight))
    assert [seq.output_token_ids for seq in sequences] == expected
    for index, theirs in enumerate(expected_logits):
        torch.testing.assert_close(torch.stack(logits[index]).cpu(), theirs, atol=1e-9, rtol=0)
    assert sum(seq.num_preemptions for seq in sequences) > 0
    assert any({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in engine.history)
    assert most_in_flight == int(async_scheduling)
    assert engine.cache.num_free_blocks == 14
    assert len(engine.executor.rows.free) == 8


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_but_whoever_reads_a_token() -> None:
    base: Any = random_gpt2(seed=5)
    base.cuda()
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=60, max_num_seqs=4, async_scheduling=True)
    engine = ch07_full_speed.Engine(base, config)
    for prompt in PROMPTS[:3]:
        engine.add_request(prompt, 20)
    for _ in range(3):
        engine.step()
    num_blocks = engine.cache.num_free_blocks
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the GPU raises, except waiting for an event
    try:
        for _ in range(12):
            assert engine.step() is not None
            assert len(engine.in_flight) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.cache.num_free_blocks < num_blocks, "no table grew, so nothing travelled"


def test_chapter_05_serves_with_this_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from chapters import ch05_server  # a machine for the GPU tests may lack a web server

    monkeypatch.setattr(ch05_server, "Engine", ch07_full_speed.Engine)
    base = random_gpt2(seed=5)
    base.config.eos_token_id = hf_greedy(base, PROMPTS[1], 6)[-1]
    settings = {"block_size": 4, "num_blocks": 14, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    answers = ch05_server.generate(
        base, PROMPTS, 20, config=PageBrainConfig.for_model(base, async_scheduling=True, **settings)
    )
    assert answers == [hf_greedy(base, prompt, 20, base.config.eos_token_id) for prompt in PROMPTS]
    assert any(len(answer) < 20 for answer in answers)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_replay_reads_and_writes_the_same_memory_again(device: torch.device) -> None:
    source = torch.ones(4, dtype=torch.int64, device=device)
    total = torch.zeros(4, dtype=torch.int64, device=device)

    def step() -> None:
        total.add_(source * 2)

    replay = capture(step, device)
    total.zero_()
    kept = source
    kept[:2].copy_(upload([10, 20], device))
    source = torch.zeros_like(source)  # a new tensor under the old name, which the recording does not know
    replay()
    arriving = Download(total)
    replay()
    assert arriving.wait() == [20, 40, 2, 2], "a download is of the moment at which it was asked for"
    assert Download(total).wait() == [40, 80, 4, 4]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_captured_steps_share_a_pool(device: torch.device) -> None:
    numbers = torch.arange(8.0, device=device)
    sums = torch.zeros(3, device=device)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def adding(place: int, count: int) -> Callable[[], None]:
        def step() -> None:
            sums[place].copy_((numbers[:count] + 1).sum())

        return step

    steps = [adding(place, count) for place, count in enumerate((8, 4, 2))]
    replays = [capture(step, device, pool) for step in steps]
    numbers.add_(1)
    for replay in replays:
        replay()
    assert sums.tolist() == [44.0, 14.0, 5.0]


X = torch.arange(4)
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: x if x.sum() > 3 else -x,
    "mask": lambda x: x[x > 1],
    "number": lambda x: x.__setitem__(0, 5),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "repeat": lambda x: x.repeat_interleave(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recording_refuses_what_a_graph_refuses(name: str) -> None:
    with pytest.raises(CaptureError, match="must not make the host wait|the host would wait for the GPU"):
        capture(lambda: REFUSED[name](X), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_refuses_it_too(name: str) -> None:
    """In a process of its own: a capture that failed is nothing to go on from."""
    script = (
        "import torch\n"
        "from chapters.aids.capture import capture\n"
        "from tests.chapters.test_full_speed_gpu import REFUSED\n"
        "device = torch.device('cuda')\n"
        "x = torch.arange(4, device=device)\n"
        f"capture(lambda: REFUSED[{name!r}](x), device)\n"
    )
    root = Path(ch07_full_speed.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "captur" in ran.stderr, ran.stderr
