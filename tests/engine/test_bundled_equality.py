"""The bundled model through the engine: the stories that Hugging Face tells with it, logit by logit."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from pagebrain import LLM, SamplingParams
from pagebrain.assets import BUNDLED_MODEL
from tests.support.models import hf_logits
from tests.support.paged import paged, run_in_chunks

PROMPTS = ["One morning Mia", "Once upon a time", "The story of Tomas and the kite.\n\n", "“Help!” said Zoë — and ran."]


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def stories(base: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Hugging Face's greedy continuation of each prompt, end of sequence included."""
    told = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = base.generate(**inputs, do_sample=False, max_new_tokens=400, pad_token_id=0)  # type: ignore[misc]
        told.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return told


TIGHT = {"num_blocks": 70, "max_num_batched_tokens": 7, "max_num_seqs": 4}


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}, TIGHT], ids=["plain", "ahead", "tight"])
def test_stories_are_those_of_hugging_face_and_end(
    settings: dict[str, Any], base: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, stories: list[list[int]]
) -> None:
    llm = LLM(dtype="float64", device="cpu", block_size=8, **({"num_blocks": 512} | settings), check_integrity=True)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=400), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == stories
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * len(PROMPTS)
    for output, story in zip(outputs, stories, strict=True):
        assert output.outputs[0].text == tokenizer.decode(story, skip_special_tokens=True)
        assert len(output.outputs[0].text) > 200
    if settings == TIGHT:
        assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_logits_equal_hugging_face_in_one_piece_and_in_chunks(
    base: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, stories: list[list[int]]
) -> None:
    sequences = [tokenizer.encode(prompt) + story for prompt, story in zip(PROMPTS, stories, strict=True)]
    expected = [hf_logits(base, sequence) for sequence in sequences]
    whole = [[len(sequence)] for sequence in sequences]
    chunks = [[7] * (len(sequence) // 7) + [len(sequence) % 7] * (len(sequence) % 7 > 0) for sequence in sequences]
    for cuts in (whole, chunks):
        model = paged(base, shuffle=1, block_size=16, num_blocks=128)
        for logits, wanted in zip(run_in_chunks(model, sequences, cuts), expected, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=0)
