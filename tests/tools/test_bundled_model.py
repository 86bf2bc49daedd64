"""The bundled model is what its card says, loads as any GPT-2, and comes out of its training script the same each time."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

from tools.storyteller import train
from tools.storyteller.evaluate import (
    END_OF_TEXT,
    HELDOUT_SEED,
    bigram_loss,
    encode_story,
    encode_texts,
    miscast,
    model_loss,
    ngram_hashes,
    overlap,
    recall_accuracy,
    training_ngrams,
)
from tools.storyteller.story_grammar import generate_story, generate_texts

FOLDER = Path(__file__).resolve().parents[2] / "pagebrain" / "assets" / "storyteller"
FRESH = 50_000  # stories from here on were neither trained on nor used for the card


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def fast_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
    return loaded


def test_model_is_a_small_gpt2_with_head_dim_64_and_room_for_long_prompts(model: GPT2LMHeadModel) -> None:
    config = model.config
    assert config.model_type == "gpt2" and config.n_embd // config.n_head == 64 and config.n_positions >= 512
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.25e6
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_folder_is_small_and_weights_are_float32_safetensors() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"F32"}


def test_weights_and_card_belong_to_the_metrics(metrics: dict[str, Any]) -> None:
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert metrics["training"]["weights_sha256"] == digest
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == train.model_card(metrics)


def test_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    rng = random.Random(0)
    texts = ["  two  spaces\n\n\ttab ", "Zoë’s piñata — “crêpe”", "漢字かな 👩‍👩‍👧 e\u0301 \u200b\x00\x1f", "", END_OF_TEXT]
    for _ in range(200):
        points = (rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(rng.randrange(40)))
        texts.append("".join(map(chr, points)))
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_tokenizer_reads_stories_as_training_did(tokenizer: Any, fast_tokenizer: Tokenizer) -> None:
    for index in range(FRESH, FRESH + 20):
        text = generate_story(HELDOUT_SEED, index).text
        assert tokenizer(text)["input_ids"] == fast_tokenizer.encode(text).ids
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == fast_tokenizer.token_to_id(END_OF_TEXT)


def test_fresh_heldout_loss_agrees_with_the_card_and_beats_bigrams(
    model: GPT2LMHeadModel, tokenizer: Any, fast_tokenizer: Tokenizer, metrics: dict[str, Any]
) -> None:
    eos = tokenizer.eos_token_id
    fresh = [tokenizer(generate_story(HELDOUT_SEED, FRESH + i).text)["input_ids"] for i in range(60)]
    loss = model_loss(model, fresh, eos)
    told = metrics["evaluation"]
    assert loss == pytest.approx(told["loss_nats_per_token"], rel=0.05)
    assert math.exp(told["loss_nats_per_token"]) == pytest.approx(told["perplexity_per_token"])
    few = encode_texts(fast_tokenizer, generate_texts(metrics["training"]["seed"], 1000))
    bigram = bigram_loss(few, fresh, len(tokenizer), eos)
    # A thousand stories make a bigram model somewhat worse than the card's, which has read them all.
    assert told["bigram_loss_nats_per_token"] < bigram < 1.3 * told["bigram_loss_nats_per_token"]
    assert loss < 0.5 * told["bigram_loss_nats_per_token"]


def test_names_and_objects_of_heldout_pairs_are_remembered(model: GPT2LMHeadModel, fast_tokenizer: Tokenizer) -> None:
    eos = fast_tokenizer.token_to_id(END_OF_TEXT)
    assert eos is not None
    stories = [encode_story(fast_tokenizer, generate_story(HELDOUT_SEED, FRESH + i, "heldout")) for i in range(50)]
    found = recall_accuracy(model, stories, eos)
    for kind in ("hero", "hero's object", "name", "object"):
        assert found[kind]["mentions"] >= 10 and found[kind]["accuracy"] > 0.9, (kind, found[kind])


def test_recall_covers_exactly_the_tokens_of_the_mention(fast_tokenizer: Tokenizer) -> None:
    checked = 0
    for index in range(20):
        encoded = encode_story(fast_tokenizer, generate_story(HELDOUT_SEED, FRESH + index, "heldout"))
        for recall, (_, covering) in zip(encoded.story.recalls, encoded.recalls):
            spelt = fast_tokenizer.decode([encoded.tokens[i] for i in covering])
            assert spelt.strip() == encoded.story.text[recall.start : recall.end]
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    "prompt", ["One morning Mia", "Once upon a time", "The story of Zoë and the kite.\n\n", END_OF_TEXT]
)
def test_greedy_story_from_a_prompt_ends_by_itself(model: GPT2LMHeadModel, tokenizer: Any, prompt: str) -> None:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, do_sample=False, max_new_tokens=400)[0].tolist()  # type: ignore[misc]
    assert out[-1] == tokenizer.eos_token_id and len(out) < 400
    story = tokenizer.decode(out[:-1]).removeprefix(END_OF_TEXT)
    assert story.startswith(prompt.removeprefix(END_OF_TEXT)) and len(story.split()) > 30
    assert story.rstrip()[-1] in '."”' and story.count('"') % 2 == 0


def test_a_story_after_hundreds_of_tokens_is_as_likely_as_alone(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    stories = [tokenizer(generate_story(HELDOUT_SEED, FRESH + i).text)["input_ids"] for i in range(40)]
    late_losses, last_stories = [], []
    for group in (stories[i : i + 4] for i in range(0, 40, 4)):
        *before, last = group
        prefix = [eos] + [token for story in before for token in (*story, eos)]
        row = torch.tensor([*prefix, *last, eos])
        if not 400 <= len(prefix) <= model.config.n_positions - len(last):
            continue
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0, len(prefix) - 1 :]
        late_losses.append(torch.nn.functional.cross_entropy(logits, row[len(prefix) :], reduction="sum").item())
        last_stories.append(last)
    assert len(last_stories) >= 5
    late = sum(late_losses) / sum(len(story) + 1 for story in last_stories)
    assert late < 1.1 * model_loss(model, last_stories, eos)


def test_miscast_finds_a_doubled_person_and_a_fourth_one_but_nothing_in_the_grammar() -> None:
    assert miscast("Once upon a time, Ben was here. His neighbour Ben joined him.")
    assert miscast("Mia met Ada the baker. Her friend Ada laughed.")
    assert miscast("Mia met Ada, Ben met Otto.")
    assert not miscast("Mia met Ada the baker. Her friend Ben laughed.")
    assert not [index for index in range(500) if miscast(generate_story(HELDOUT_SEED, FRESH + index).text)]


def test_overlap_counts_exactly_the_repeated_ngrams() -> None:
    eos = 9
    training = encode_texts(_digits(), ["0123456701234567012345", "7654321076543210765432"])
    known = training_ngrams(training, eos)
    copied = training[0][1:22].tolist()  # 21 tokens: two 20-grams, both known
    changed = [*copied[:-1], 8]  # the second one is new
    assert len(ngram_hashes(training[0])) == 3
    assert overlap([copied], known) == 1.0
    assert overlap([changed], known) == 0.5
    assert overlap([copied, [8] * 21], known) == 0.5


def _digits() -> Tokenizer:
    from tokenizers import models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(digit): digit for digit in range(10)}, unk_token="9"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def test_short_training_is_reproducible_and_depends_on_the_seed(tmp_path: Path) -> None:
    def trained(folder: str, seed: int) -> tuple[bytes, bytes]:
        out = tmp_path / folder
        train.main([
            "--out", str(out), "--seed", str(seed), "--corpus-stories", "150", "--steps", "2", "--batch-rows", "2",
            "--eval-stories", "2", "--samples", "1", "--device", "cpu",
        ])  # fmt: skip
        return (out / "model.safetensors").read_bytes(), (out / "tokenizer.json").read_bytes()

    first = trained("first", 5)
    assert trained("second", 5) == first
    assert trained("third", 6) != first
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["training"]["last_training_loss"] < math.log(metrics["training"]["vocab_size"])
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "first").config.n_positions == 1024


def test_too_few_stories_for_one_row_are_refused(fast_tokenizer: Tokenizer) -> None:
    import numpy as np

    documents = encode_texts(fast_tokenizer, generate_texts(0, 1))
    with pytest.raises(ValueError, match="do not fill one row of 1025 tokens"):
        next(train.packed_rows(documents, 0, 1025, np.random.default_rng(0)))


def test_rows_begin_with_a_story_half_of_them_after_an_end_mark(fast_tokenizer: Tokenizer) -> None:
    import numpy as np

    eos = fast_tokenizer.token_to_id(END_OF_TEXT)
    assert eos is not None
    documents = encode_texts(fast_tokenizer, generate_texts(0, 300))
    openings = {tuple(document[:8].tolist()) for document in documents}
    rows = train.packed_rows(documents, eos, 513, np.random.default_rng(0))
    with_mark = 0
    for _ in range(200):
        row = next(rows).tolist()
        with_mark += row[0] == eos
        opening = row[1:9] if row[0] == eos else row[:8]
        assert len(row) == 513 and tuple(opening) in openings
    assert 60 < with_mark < 140
