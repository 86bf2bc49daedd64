"""Measures the bundled story model: its loss, what it remembers, and how much of its text it merely repeats.

``train.py`` calls ``measure``; ``python -m tools.storyteller.evaluate FOLDER`` measures a saved folder again.
Held-out stories come from the same grammar with another seed, so nothing here has to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from pagebrain.machine import available_cores
from tools.storyteller.story_grammar import HELD_OUT, NAMES, POOLS, Split, Story, generate_story, generate_texts

Tokens = NDArray[np.uint16]

END_OF_TEXT = "<|endoftext|>"
HELDOUT_SEED = 1_000_003  # the training stream has another seed, and story texts are checked to differ
NGRAM = 20
SAMPLE_LIMIT = 400  # tokens; a story that has not ended by then counts as not ended


@dataclass(frozen=True)
class Encoded:
    """A story as tokens, and for each of its recalls the token positions that spell it."""

    story: Story
    tokens: list[int]
    recalls: list[tuple[str, list[int]]]


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token that begins and ends a story. Raises ``ValueError`` if ``tokenizer`` has none."""
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT!r} token; train it with tools/storyteller/train.py")
    return int(token_id)


def _encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Tokens]:
    """Each text as a uint16 array, without end-of-text marks."""
    documents: list[Tokens] = []
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 10_000:
            documents += _encode_batch(tokenizer, batch)
            batch = []
    return documents + _encode_batch(tokenizer, batch)


def encode_story(tokenizer: Tokenizer, story: Story) -> Encoded:
    """``story`` in tokens; a recall covers every token that overlaps its characters."""
    encoding = tokenizer.encode(story.text)
    recalls = []
    for recall in story.recalls:
        covering = [i for i, (start, end) in enumerate(encoding.offsets) if end > recall.start and start < recall.end]
        recalls.append((recall.kind, covering))
    return Encoded(story, encoding.ids, recalls)


def heldout_stories(count: int, split: Split) -> list[Story]:
    """``count`` stories from the held-out seed."""
    return [generate_story(HELDOUT_SEED, index, split) for index in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------------


def _padded(documents: Sequence[Sequence[int]], eos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both [n, longest+1]: ``eos`` opens the one and closes the other; -100 is padding."""
    longest = max(len(tokens) for tokens in documents)
    inputs = torch.full((len(documents), longest + 1), eos)
    targets = torch.full((len(documents), longest + 1), -100)
    for row, tokens in enumerate(documents):
        inputs[row, 1 : len(tokens) + 1] = torch.tensor(tokens)
        targets[row, : len(tokens) + 1] = torch.tensor([*tokens, eos])
    return inputs, targets


@torch.no_grad()
def model_loss(model: GPT2LMHeadModel, documents: Sequence[Sequence[int]], eos: int, batch: int = 32) -> float:
    """Nats per token over ``documents``, each predicted alone, from one ``eos`` to its closing ``eos``."""
    total, count = 0.0, 0
    by_length = sorted(documents, key=len)  # equal lengths side by side: little padding
    for begin in range(0, len(by_length), batch):
        inputs, targets = _padded(by_length[begin : begin + batch], eos)
        logits = model(inputs.to(model.device), use_cache=False).logits.float()
        targets = targets.to(model.device)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@torch.no_grad()
def loss_by_position(
    model: GPT2LMHeadModel, rows: NDArray[np.int64], spans: Sequence[tuple[int, int]], batch: int = 16
) -> dict[str, float]:
    """Nats per token at the positions low .. high-1 of each span, over packed ``rows`` [n, n_positions+1]."""
    per_position = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    for begin in range(0, len(rows), batch):
        part = torch.from_numpy(rows[begin : begin + batch]).to(model.device)
        logits = model(part[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        per_position += losses.view(len(part), -1).double().sum(0).cpu()
    return {f"{low}-{high - 1}": float(per_position[low:high].mean()) / len(rows) for low, high in spans}


def bigram_loss(
    training: Iterable[Tokens], documents: Sequence[Sequence[int]], vocab_size: int, eos: int, k: float = 0.1
) -> float:
    """Nats per token of ``training``'s add-``k`` bigram model, on the tokens that ``model_loss`` scores."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float64)
    for stream in training:
        closed = np.concatenate(([eos], stream, [eos])).astype(np.int64)
        np.add.at(counts, closed[:-1] * vocab_size + closed[1:], 1.0)
    table = counts.reshape(vocab_size, vocab_size) + k
    log_probs = np.log(table / table.sum(axis=1, keepdims=True))
    total, count = 0.0, 0
    for tokens in documents:
        closed = np.array([eos, *tokens, eos])
        total -= float(log_probs[closed[:-1], closed[1:]].sum())
        count += len(tokens) + 1
    return total / count


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recall_accuracy(
    model: GPT2LMHeadModel, stories: Sequence[Encoded], eos: int, batch: int = 32
) -> dict[str, dict[str, float]]:
    """Top-1 accuracy of whole recalls, teacher-forced, by kind.

    A recall is right when the most likely token is the true one at each of its tokens. "name" and "object"
    take every such mention; "hero" and "hero's object" only those of the pair that the story is filed under.
    """
    hits: dict[str, list[bool]] = {}
    ordered = sorted(stories, key=lambda encoded: len(encoded.tokens))
    for begin in range(0, len(ordered), batch):
        part = ordered[begin : begin + batch]
        inputs, _ = _padded([encoded.tokens for encoded in part], eos)
        # best[row, i] is the model's first choice for token i of that story.
        best = model(inputs.to(model.device), use_cache=False).logits.argmax(-1).cpu()
        for row, encoded in enumerate(part):
            for recall, (kind, covering) in zip(encoded.story.recalls, encoded.recalls, strict=True):
                hit = all(int(best[row, i]) == encoded.tokens[i] for i in covering)
                hits.setdefault(kind, []).append(hit)
                said = encoded.story.text[recall.start : recall.end]
                if said == encoded.story.hero:
                    hits.setdefault("hero", []).append(hit)
                elif kind == "object" and said.endswith(encoded.story.noun):
                    hits.setdefault("hero's object", []).append(hit)
    return {kind: {"accuracy": sum(h) / len(h), "mentions": len(h)} for kind, h in sorted(hits.items())}


# ------------------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], eos: int, seed: int, temperature: float = 0.8
) -> list[list[int]]:
    """One continuation per prompt, by plain temperature sampling; it holds its ``eos`` if it got that far."""
    torch.manual_seed(seed)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), eos)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padding goes on the left, where the mask hides it
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(  # type: ignore[misc]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=SAMPLE_LIMIT,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    continuations = []
    for row in out[:, longest:].tolist():
        continuations.append(row[: row.index(eos) + 1] if eos in row else row)
    return continuations


def ngram_hashes(tokens: NDArray[Any], n: int = NGRAM) -> NDArray[np.uint64]:
    """A 64-bit hash of every ``n`` consecutive tokens; two different n-grams share one (chance: about 1e-19)
    too rarely to move the figures made from it."""
    if len(tokens) < n:
        return np.zeros(0, dtype=np.uint64)
    per_token = np.random.default_rng(0).integers(1, 2**63, size=65_536, dtype=np.uint64)
    values = per_token[tokens]
    windows = len(tokens) - n + 1
    hashes = np.zeros(windows, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * np.uint64(6364136223846793005) + values[offset : offset + windows]
    return hashes


def training_ngrams(training: Sequence[Tokens], eos: int) -> NDArray[np.uint64]:
    """Sorted hashes of all n-grams of the training text, stories being joined by ``eos`` as in training."""
    end = np.array([eos], dtype=np.uint16)
    joined = np.concatenate([part for story in training for part in (story, end)])
    return np.unique(ngram_hashes(joined))


def overlap(samples: Sequence[Sequence[int]], known: NDArray[np.uint64]) -> float:
    """Share of the samples' n-grams that the training text also holds, token for token."""
    found = total = 0
    for tokens in samples:
        hashes = ngram_hashes(np.array(tokens, dtype=np.uint16))
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found += int((known[at] == hashes).sum())
        total += len(hashes)
    return found / total


_NAME = f"({'|'.join(NAMES)})"
_FRIEND = re.compile(rf"(?:{'|'.join(POOLS['rel'])}) {_NAME}|playing with {_NAME} and {_NAME}")
_TRADESPERSON = re.compile(rf"{_NAME},? (?:the|an?) (?:{'|'.join(POOLS['trade'])})\b")


def miscast(text: str) -> bool:
    """Whether the first plot of ``text`` has a fourth person in it, or introduces one person in two roles.

    The grammar never does either; a model does it when it loses track of who is there.
    """
    plot = text.split("* * *")[0]
    people = re.findall(rf"\b{_NAME}\b", plot)
    friends = [name for groups in _FRIEND.findall(plot) for name in groups if name]
    roles = [{people[0]} if people else set(), set(friends), set(_TRADESPERSON.findall(plot))]
    doubled = len(set().union(*roles)) < sum(map(len, roles)) or len(set(friends)) < len(friends)
    return doubled or len(set(people)) > 3


def _quotes_closed(text: str) -> bool:
    return text.count('"') % 2 == 0 and text.count("“") == text.count("”")


def _keeps_to_title(text: str, name: str, noun: str) -> bool:
    return text.count(name) >= 2 and text.count(noun) >= 2


def measure(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    training: Sequence[Tokens],
    count: int,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The card's figures, from ``count`` held-out stories of each split and ``samples`` sampled ones."""
    model.eval()  # type: ignore[no-untyped-call]
    eos = end_of_text_id(tokenizer)
    seen = [encode_story(tokenizer, story) for story in heldout_stories(count, "train")]
    unseen = [encode_story(tokenizer, story) for story in heldout_stories(count, "heldout")]
    seen_tokens = [encoded.tokens for encoded in seen]
    loss = model_loss(model, seen_tokens, eos)
    bigram = bigram_loss(training, seen_tokens, tokenizer.get_vocab_size(), eos)
    free = sample(model, [[eos]] * samples, eos, seed)
    texts = [tokenizer.decode(tokens) for tokens in free]
    pairs = sorted(HELD_OUT)[:: max(1, len(HELD_OUT) // samples)][:samples]
    titles = [f"The story of {name} and the {noun}.\n\n" for name, noun in pairs]
    titled = sample(model, [[eos, *tokenizer.encode(title).ids] for title in titles], eos, seed + 1)
    titled_texts = [tokenizer.decode(tokens) for tokens in titled]
    known = training_ngrams(training, eos)
    return {
        "heldout_stories": count,
        "heldout_tokens": sum(len(tokens) + 1 for tokens in seen_tokens),
        "loss_nats_per_token": loss,
        "perplexity_per_token": math.exp(loss),
        "loss_heldout_pairs": model_loss(model, [encoded.tokens for encoded in unseen], eos),
        "bigram_loss_nats_per_token": bigram,
        "bigram_perplexity_per_token": math.exp(bigram),
        "recall_seen_pairs": recall_accuracy(model, seen, eos),
        "recall_heldout_pairs": recall_accuracy(model, unseen, eos),
        "samples": samples,
        "sample_temperature": 0.8,
        "sample_20gram_overlap": overlap(free, known),
        "fresh_grammar_20gram_overlap": overlap(seen_tokens, known),
        "samples_ending_within_400_tokens": sum(eos in tokens for tokens in free) / samples,
        "samples_distinct": len(set(texts)) / samples,
        "samples_with_closed_quotes": sum(map(_quotes_closed, texts)) / samples,
        "samples_miscast": sum(map(miscast, texts)) / samples,
        "samples_mean_tokens": sum(map(len, free)) / samples,
        "titled_heldout_pairs_kept": sum(
            _keeps_to_title(text, *pair) for text, pair in zip(titled_texts, pairs, strict=True)
        )
        / len(pairs),
        "sample_texts": texts[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder written by tools/storyteller/train.py")
    parser.add_argument("--stories", type=int, default=2000, help="held-out stories per split")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    trained = json.loads((args.folder / "metrics.json").read_text(encoding="utf-8"))["training"]
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    model = GPT2LMHeadModel.from_pretrained(args.folder, trust_remote_code=False).to(args.device)
    texts = generate_texts(trained["seed"], trained["corpus_stories"], workers=available_cores())
    training = encode_texts(tokenizer, texts)
    figures = measure(model, tokenizer, training, args.stories, args.samples, trained["seed"])
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
