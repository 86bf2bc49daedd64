"""The lengths that chapters 01 and 02 ask about in their last tasks are those of the notebooks' six stories."""

import re

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from chapters import ch02_block_table
from pagebrain.assets import BUNDLED_MODEL
from tests.chapters import test_ch01_naive_kv_cache as ch01_tests

STORIES = (
    "One day",
    "And so they went home.",
    "The fox said",
    "It was a good day.",
    "A boy",
    '"Thank you," said the fox',
)


@pytest.mark.slow
def test_the_six_stories_have_the_lengths_that_the_tests_count_with() -> None:
    exact = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    prompts = [tokenizer.encode(text) for text in STORIES]
    answers = ch02_block_table.generate(exact, prompts, 400)
    assert [len(prompt) for prompt in prompts] == ch01_tests.NUM_PROMPT
    assert [len(answer) for answer in answers] == ch01_tests.NUM_ANSWER


def test_task_2_5_tells_the_lengths_of_the_six_stories() -> None:
    words = " ".join((ch02_block_table.answer_2_5.__doc__ or "").split())
    [prompts] = re.findall(r"prompts of ([\d, and]+) tokens", words)
    [answers] = re.findall(r"answers of ([\d, and]+) tokens", words)
    assert [int(number) for number in re.findall(r"\d+", prompts)] == ch01_tests.NUM_PROMPT
    assert [int(number) for number in re.findall(r"\d+", answers)] == ch01_tests.NUM_ANSWER
