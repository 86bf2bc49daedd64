"""The engine as it runs on a GPU is equal to Hugging Face: graphs on and off, launched ahead or not, under preemption.

Logits are looked at where they are computed, inside the graphs too: the head leaves a copy in a buffer of its own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from pagebrain import LLM, BeamSearchParams, PageBrainConfig, SamplingParams
from pagebrain.errors import ConfigError
from pagebrain.models.loading import load_model
from tests.support.models import hf_greedy, hf_logits, random_gpt2

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {"n_positions": 256, "n_embd": 192, "n_head": 3, "n_layer": 4, "vocab_size": 1003}
PROMPTS = [[int(i * 7919 % 1000) for i in range(length)] for length in (5, 40, 1, 100, 17, 63)]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
ROOMY: dict[str, Any] = {"num_blocks": 80, "max_num_seqs": 8, "max_num_batched_tokens": 64}
TIGHT: dict[str, Any] = {"num_blocks": 11, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 160}


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(base: GPT2LMHeadModel) -> GPT2LMHeadModel:
    moved: GPT2LMHeadModel = base.to("cuda")  # type: ignore[arg-type]
    return moved


@pytest.mark.parametrize("settings", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["launches", "graphs"])
def test_logits_and_tokens_equal_hugging_face(settings: dict[str, Any], async_scheduling: bool, cuda_graphs: bool) -> None:
    from tests.support.full_speed import FullSpeed, num_preemptions, token_lists

    oracle = random_gpt2(torch.float32, seed=3, **SHAPE)
    engine = FullSpeed(
        on_gpu(random_gpt2(torch.float32, seed=3, **SHAPE)),
        watched=True,
        cuda_graphs=cuda_graphs,
        async_scheduling=async_scheduling,
        **settings,
    )
    outputs = engine.generate(PROMPTS, GREEDY)
    for prompt, tokens in zip(PROMPTS, token_lists(outputs), strict=True):
        assert_tokens_equal(oracle, prompt, tokens)
    num_compared = 0
    for seq_id, (prompt, tokens) in enumerate(zip(PROMPTS, token_lists(outputs), strict=True)):
        expected = hf_logits(oracle, prompt + tokens)
        for (owner, context_len), logits in engine.decode_logits.items():
            if owner == seq_id:
                torch.testing.assert_close(logits.cpu(), expected[context_len - 1], atol=1e-4, rtol=0)
                num_compared += 1
    stats = engine.llm.engine.stats()
    assert num_compared > 40
    assert (num_preemptions(outputs) > 0) == (settings is TIGHT)
    if cuda_graphs:
        assert stats.num_graph_decode_tokens == stats.num_decode_tokens
    else:
        assert stats.num_graph_decode_tokens == 0
    assert engine.num_mixed > 0 and (engine.num_chunk_graphs > 0) == cuda_graphs
    pairs = list(zip(engine.traces, engine.traces[1:], strict=False))
    ahead = sum(later.launched_s < earlier.read_s for earlier, later in pairs)
    assert ahead > len(pairs) // 2 if async_scheduling else ahead == 0


def assert_tokens_equal(oracle: GPT2LMHeadModel, prompt: list[int], tokens: list[int]) -> None:
    """Equal, or the oracle's two best scores are closer than ten tolerances where they part."""
    theirs = hf_greedy(oracle, prompt, len(tokens))
    if tokens != theirs:
        split = next(index for index, (a, b) in enumerate(zip(tokens, theirs, strict=True)) if a != b)
        best = hf_logits(oracle, prompt + theirs[:split])[-1].topk(2).values
        assert best[0] - best[1] < 10 * 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_hugging_face(dtype: torch.dtype) -> None:
    """Error against the float64 oracle with the same rounded weights, over all logits of all steps that graphs computed."""
    from tests.support.full_speed import FullSpeed, token_lists

    half = on_gpu(random_gpt2(dtype, seed=3, **SHAPE))
    exact = random_gpt2(torch.float64, seed=3, **SHAPE)
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    exact = on_gpu(exact)
    engine = FullSpeed(half, watched=True, async_scheduling=True, **ROOMY)
    outputs = engine.generate(PROMPTS, GREEDY)
    ours, theirs = [], []
    for seq_id, (prompt, tokens) in enumerate(zip(PROMPTS, token_lists(outputs), strict=True)):
        text = torch.tensor([prompt + tokens], device="cuda")
        with torch.no_grad():
            truth = exact(text, use_cache=False).logits[0]
            hugging_face = half(text, use_cache=False).logits[0].double()
        for (owner, context_len), logits in engine.decode_logits.items():
            if owner == seq_id:
                ours.append(logits.double() - truth[context_len - 1])
                theirs.append(hugging_face[context_len - 1] - truth[context_len - 1])
    assert len(ours) > 40 and rms(theirs) > 0
    assert rms(ours) <= 1.25 * rms(theirs)


def rms(differences: list[Tensor]) -> float:
    return float(torch.stack(differences).square().mean().sqrt())


def test_full_size_gpt2_in_float32_equals_hugging_face() -> None:
    """124M random weights, contexts across many blocks, several splits of one context."""
    from tests.support.full_speed import FullSpeed, token_lists

    config = PageBrainConfig(model="openai-community/gpt2", load_format="dummy", dtype="float32", device="cuda")
    base = load_model(config)
    oracle: GPT2LMHeadModel = load_model(config)
    oracle.set_attn_implementation("eager")
    prompts = [[int(i * 7919 % 50257) for i in range(length)] for length in (700, 3, 130)]
    engine = FullSpeed(base, watched=True, async_scheduling=True, max_num_seqs=4, num_blocks=200)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    compared = 0
    for seq_id, (prompt, tokens) in enumerate(zip(prompts, token_lists(outputs), strict=True)):
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt + tokens], device="cuda"), use_cache=False).logits[0]
        for (owner, context_len), logits in engine.decode_logits.items():
            if owner == seq_id:
                torch.testing.assert_close(logits, expected[context_len - 1], atol=1e-4, rtol=0)
                compared += 1
        assert tokens == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert compared == 3 * 19 and engine.num_chunk_graphs == 1


def test_a_seed_gives_the_same_tokens_in_any_batch_with_and_without_graphs() -> None:
    from tests.support.full_speed import FullSpeed, num_preemptions, token_lists

    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=number, max_tokens=48, ignore_eos=True)
        for number in range(len(PROMPTS))
    ]
    alone = FullSpeed(on_gpu(random_gpt2(torch.float32, seed=3, **SHAPE)), num_blocks=80, max_num_seqs=1)
    expected = token_lists(alone.generate(PROMPTS, params))
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    for settings in (ROOMY, TIGHT):
        for graphs in (False, True):
            engine = FullSpeed(
                on_gpu(random_gpt2(torch.float32, seed=3, **SHAPE)), cuda_graphs=graphs, async_scheduling=True, **settings
            )
            outputs = engine.generate(PROMPTS, params)
            assert token_lists(outputs) == expected
            assert (num_preemptions(outputs) > 0) == (settings is TIGHT)
            assert (engine.llm.engine.stats().num_graph_decode_tokens > 0) == graphs


def test_launching_waits_for_nothing() -> None:
    """With torch watching for whatever makes the host wait for the GPU."""
    base = on_gpu(random_gpt2(torch.bfloat16, **SHAPE))
    llm = LLM(base, num_blocks=80, max_num_seqs=8, max_num_batched_tokens=64)
    plain = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=9, ignore_eos=True)
    special = SamplingParams(
        temperature=0.8, seed=1, max_tokens=9, repetition_penalty=1.2, logit_bias={3: 1.0}, min_tokens=4, logprobs=2
    )
    params = [plain, special] * (len(PROMPTS) // 2)
    llm.generate(PROMPTS, params, use_tqdm=False)  # whatever happens once
    launch, launched = llm.engine.executor.launch, 0

    def strict(group: Any) -> Any:
        nonlocal launched
        launched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(group)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    llm.engine.executor.launch = strict  # type: ignore[method-assign]
    llm.generate(PROMPTS, params, use_tqdm=False)
    assert launched > 9


def test_the_engine_says_what_it_found_and_takes_the_share_of_memory_it_was_given() -> None:
    base = on_gpu(random_gpt2(torch.bfloat16, **SHAPE))
    _, total = torch.cuda.mem_get_info()
    llm = LLM(base, memory_fraction=0.01, max_num_seqs=512, max_num_batched_tokens=1024)
    assert llm.config.async_scheduling and llm.config.cuda_graphs and llm.engine.depth == 1
    [line] = llm.notices
    assert torch.cuda.get_device_name() in line and "CUDA graphs: recorded in" in line
    taken = (llm.config.num_blocks or 0) * llm.config.block_bytes
    assert 0 < taken <= min(0.01 * total, 512 * 256 * llm.config.token_bytes)


def test_too_little_memory_is_a_line_that_names_the_setting() -> None:
    base = on_gpu(random_gpt2(torch.bfloat16, **SHAPE))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(ConfigError, match="no room for the largest step.* lower max_num_batched_tokens"):
            LLM(base, max_num_batched_tokens=4_000_000)
        torch.cuda.empty_cache()
        with pytest.raises(ConfigError, match="no room for K and V in 100,000 blocks.* lower num_blocks"):
            LLM(base, num_blocks=100_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_an_engine_that_was_dropped_gives_its_memory_to_the_next() -> None:
    base = on_gpu(random_gpt2(torch.bfloat16, **SHAPE))
    counts = []
    for _ in range(3):
        llm = LLM(base, memory_fraction=0.5, max_num_seqs=60_000, max_num_batched_tokens=100_000, cuda_graphs=False)
        counts.append(llm.config.num_blocks or 0)
        del llm
    assert min(counts) > 0.95 * max(counts)


def test_an_engine_may_be_on_another_gpu_than_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    from tests.support.full_speed import FullSpeed, token_lists

    base: GPT2LMHeadModel = random_gpt2(torch.float32, seed=3, **SHAPE).to("cuda:1")  # type: ignore[arg-type]
    engine = FullSpeed(base, async_scheduling=True, **ROOMY)
    assert engine.executor.rows.token_ids.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    for prompt, tokens in zip(PROMPTS, token_lists(engine.generate(PROMPTS, GREEDY)), strict=True):
        assert_tokens_equal(random_gpt2(torch.float32, seed=3, **SHAPE), prompt, tokens)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["launches", "graphs"])
def test_sequences_that_were_swapped_get_the_same_tokens(async_scheduling: bool, cuda_graphs: bool) -> None:
    found = []
    swapping: dict[str, Any] = TIGHT | {"swap_space_gib": 0.05, "preemption_mode": "swap", "prefix_caching": False}
    for settings in (ROOMY, swapping):
        base = on_gpu(random_gpt2(torch.float32, seed=3, **SHAPE))
        llm = LLM(base, async_scheduling=async_scheduling, cuda_graphs=cuda_graphs, **settings)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        assert (llm.engine.stats().num_swapped_in_blocks > 0) == (settings is swapping)
    assert llm.engine.cache_manager.swap_space.costs.swap_block_s
    assert found[0] == found[1]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_beams_are_those_of_the_torch_operations(async_scheduling: bool) -> None:
    params = BeamSearchParams(4, 12, ignore_eos=True)
    base = random_gpt2(torch.float32, seed=3, **SHAPE)
    expected = LLM(base, num_blocks=96, block_size=8, device="cpu").beam_search(PROMPTS, params)
    on_device = on_gpu(random_gpt2(torch.float32, seed=3, **SHAPE))
    found = LLM(on_device, async_scheduling=async_scheduling, **ROOMY).beam_search(PROMPTS, params)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.sequences[0].tokens == theirs.sequences[0].tokens
        assert ours.sequences[0].score == pytest.approx(theirs.sequences[0].score, abs=1e-4)
