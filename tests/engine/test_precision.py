"""Full-size GPT-2, and the dtypes below float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.layers import prepare
from pagebrain.layers.linear import can_pack
from pagebrain.models.gpt2 import PagedGPT2LMHeadModel
from pagebrain.models.loading import load_model
from tests.support.models import hf_greedy, hf_logits, poison, random_gpt2
from tests.support.paged import paged, run_in_chunks
from tests.support.tokenizers import byte_tokenizer

SEQUENCES = [[int(i * 7919 % 257) for i in range(length)] for length in (40, 3, 64)]


def paged_logits(base: GPT2LMHeadModel, sequences: list[list[int]], packed: bool = False) -> list[Tensor]:
    """Logits of each sequence, its first half in one call and the rest token by token beside the others."""
    config = PageBrainConfig.for_model(base, block_size=16, num_blocks=64)
    cache_manager = CacheManager(BlockManager(config), config)
    poison(cache_manager.pool)
    model = PagedGPT2LMHeadModel(base, cache_manager).eval()
    if packed:
        prepare(model, kernels=False, owned=True)
    halves = [len(sequence) // 2 + 1 for sequence in sequences]
    ids = torch.zeros(len(sequences), max(halves), dtype=torch.int64)
    for row, (sequence, half) in enumerate(zip(sequences, halves, strict=True)):
        ids[row, :half] = torch.tensor(sequence[:half])
    first = torch.tensor([[0, half] for half in halves])
    out = model(ids, input_pos=first, cache_pos=torch.zeros_like(first)).logits
    logits = [[out[row, :half]] for row, half in enumerate(halves)]
    done = list(halves)
    while True:
        left = [row for row, sequence in enumerate(sequences) if done[row] < len(sequence)]
        if not left:
            return [torch.cat(pieces) for pieces in logits]
        ids = torch.tensor([[sequences[row][done[row]]] for row in left])
        input_pos = torch.tensor([[done[row], 1] for row in left])
        cache_pos = torch.tensor([[0, done[row]] for row in left])
        out = model(ids, input_pos=input_pos, cache_pos=cache_pos, seq_ids=left).logits
        for index, row in enumerate(left):
            logits[row].append(out[index])
            done[row] += 1


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["shared", "packed"])
def test_half_precision_is_no_further_from_the_truth_than_hugging_face(dtype: torch.dtype, packed: bool) -> None:
    """Error against the float64 oracle on the same (rounded) weights, teacher-forced, over all logits."""
    if packed and not can_pack(dtype, torch.device("cpu")):
        pytest.skip(f"this processor or build of torch does not pack {dtype} weights")
    shape = {"n_embd": 192, "n_layer": 4, "vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256}
    half = random_gpt2(dtype, **shape)
    exact = random_gpt2(torch.float64, **shape)
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    truth = torch.cat([hf_logits(exact, sequence) for sequence in SEQUENCES])
    theirs = rms(torch.cat([hf_logits(half, sequence) for sequence in SEQUENCES]) - truth)
    ours = rms(torch.cat(paged_logits(half, SEQUENCES, packed)) - truth)
    assert theirs > 0
    assert ours <= 1.25 * theirs


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with 124M random weights, saved to a folder as a user would have it."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = load_model(PageBrainConfig(model="openai-community/gpt2", load_format="dummy", dtype="float32", device="cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_full_size_logits_equal_hugging_face(full_size: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(full_size, attn_implementation="eager").eval()
    kinds = (False, True) if can_pack(torch.float32, torch.device("cpu")) else (False,)
    for packed in kinds:  # packing last: it uses up the base model's weights
        expected = [hf_logits(base, sequence) for sequence in SEQUENCES]
        for logits, wanted in zip(paged_logits(base, SEQUENCES, packed), expected, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_full_size_long_context_in_shuffled_blocks_and_uneven_chunks(full_size: Path) -> None:
    """Long enough that a step gathers its pages in several turns."""
    base = GPT2LMHeadModel.from_pretrained(full_size, attn_implementation="eager").eval()
    sequence = [int(i * 7919 % 257) for i in range(1024)]
    model = paged(base, shuffle=3, block_size=8, num_blocks=140)
    logits = run_in_chunks(model, [sequence], [[300, 1, 511, 211, 1]])[0]
    torch.testing.assert_close(logits, hf_logits(base, sequence), atol=1e-4, rtol=0)


def test_full_size_tokens_equal_hugging_face_after_loading_from_a_folder(full_size: Path) -> None:
    llm = LLM(str(full_size), dtype="float32", device="cpu", num_blocks=16, max_model_len=80)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(SEQUENCES, params, use_tqdm=False)
    base = GPT2LMHeadModel.from_pretrained(full_size, attn_implementation="eager").eval()
    for sequence, output in zip(SEQUENCES, outputs, strict=True):
        ours, theirs = list(output.outputs[0].token_ids), hf_greedy(base, sequence, 12)
        if ours != theirs:  # excused only where the two best scores are closer than ten tolerances
            split = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            best = hf_logits(base, sequence + theirs[:split])[-1].topk(2).values
            assert best[0] - best[1] < 10 * 1e-4
