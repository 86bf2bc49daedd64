"""Trains the bundled story model: ``python -m tools.storyteller.train --out pagebrain/assets/storyteller``.

Corpus (``story_grammar.py``), tokenizer, weights, measurements (``evaluate.py``) and model card
come from this one command and its seed; the folder that it writes loads through ``from_pretrained`` as any GPT-2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast  # type: ignore[attr-defined]

from pagebrain.machine import available_cores
from tools.storyteller.evaluate import (
    END_OF_TEXT,
    HELDOUT_SEED,
    Tokens,
    encode_texts,
    end_of_text_id,
    loss_by_position,
    measure,
)
from tools.storyteller.story_grammar import NAMES, generate_texts

VOCAB_SIZE = 2048
N_POSITIONS = 1024
TOKENIZER_STORIES = 20_000  # enough for every word of the grammar; more only costs time


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries: all bytes, merges and, last as in GPT-2, the end-of-text mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # Within a line a name is one token, with the space before it. A paragraph begins with a bare name, too seldom to
    # earn a token by itself, and a small model misspells what it has to copy in pieces: so bare names count extra.
    bare_names = [name for name in NAMES for _ in range(max(1, len(texts) // 20))]
    tokenizer.train_from_iterator([*texts, *bare_names], trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def new_model(tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """An untrained GPT-2 of about a million parameters: 4 layers, 2 heads of 64, tied embeddings."""
    eos = end_of_text_id(tokenizer)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=N_POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return GPT2LMHeadModel(config)


def packed_rows(documents: Sequence[Tokens], eos: int, length: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Training rows of ``length`` tokens: shuffled stories with ``eos`` between them, round after round.

    Each row begins with a story, half of the rows with the ``eos`` before it: position 0 then knows both a bare
    prompt and a BOS. A story that a row cuts off is not resumed; the next row begins with another.
    Raises ``ValueError`` if all the stories together do not fill one row.
    """
    if sum(len(document) + 1 for document in documents) <= length:
        raise ValueError(f"{len(documents)} stories do not fill one row of {length} tokens; use more stories")
    end = np.array([eos], dtype=np.uint16)
    lengths = np.array([len(document) for document in documents]) + 1
    while True:
        order = rng.permutation(len(documents))
        parts = [part for i in order for part in (documents[i], end)]
        stream = np.concatenate([end, *parts]).astype(np.int64)
        starts = 1 + np.concatenate(([0], np.cumsum(lengths[order])[:-1]))
        story = 0
        while story < len(starts):
            begin = int(starts[story]) - int(rng.random() < 0.5)
            if begin + length > len(stream):
                break
            yield stream[begin : begin + length]
            story = int(np.searchsorted(starts, begin + length))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to a twentieth of ``peak``."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: GPT2LMHeadModel, rows: Iterator[NDArray[np.int64]], steps: int, batch_rows: int, peak_lr: float) -> float:
    """Train in place for ``steps`` batches; returns the mean loss of the last twentieth, in nats per token."""
    device = model.device
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), eps=1e-8)
    model.train()
    last: list[torch.Tensor] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        batch = torch.from_numpy(np.stack([next(rows) for _ in range(batch_rows)])).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= steps - max(1, steps // 20):
            last.append(loss.detach())
        if step % max(1, steps // 40) == 0:
            print(f"step {step:6d}  loss {loss.item():.4f}", flush=True)
    return float(torch.stack(last).mean())


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (float32 safetensors), configs and tokenizer files to ``out``."""
    eos = end_of_text_id(tokenizer)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos
    )
    model.cpu().save_pretrained(out)
    wrapped = GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=N_POSITIONS,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    wrapped.save_pretrained(out)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def model_card(metrics: dict[str, Any]) -> str:
    """The README of the folder, every number in it taken from ``metrics``."""
    made, found = metrics["training"], metrics["evaluation"]
    seen, unseen = found["recall_seen_pairs"], found["recall_heldout_pairs"]
    recall_rows = "\n".join(
        f"| {label} | {_percent(seen[kind]['accuracy'])} of {seen[kind]['mentions']:,} "
        f"| {_percent(unseen[kind]['accuracy'])} of {unseen[kind]['mentions']:,} |"
        for kind, label in (
            ("hero", "the hero's name"),
            ("hero's object", "the hero's object, with its adjective"),
            ("name", "any name"),
            ("object", "any object"),
            ("detail", "a mark, place, promise, message or gift"),
        )
        if kind in seen and kind in unseen  # a very short evaluation may meet none
    )
    packed = found["packed_loss_by_position"]
    positions = ", ".join(f"{loss:.3f} at positions {span}" for span, loss in packed.items())
    kept = found["titled_heldout_pairs_kept"]
    samples = "\n\n---\n\n".join(
        text.replace(END_OF_TEXT, "").replace("* * *", "\\* \\* \\*") for text in found["sample_texts"]
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# PageBrain storyteller

A GPT-2 of {made["parameters"]:,} parameters that tells toy stories. It is bundled with PageBrain. So every lesson,
test and benchmark has a real trained model to serve, without a download.

- **Architecture**: `GPT2LMHeadModel`, 4 layers, 2 heads of dimension 64, width 128,
  {made["n_positions"]} positions, tied embeddings, float32 safetensors.
- **Tokenizer**: byte-level BPE of {made["vocab_size"]} entries. It contains all 256 bytes, so any text
  round-trips. `{END_OF_TEXT}` (id {made["vocab_size"] - 1}) begins and ends a story. Start from it, or from a
  bare prompt such as `One morning Mia`, `Once upon a time` or `The story of Mia and the kite.` and a blank line.
- **Licence**: Apache-2.0, like the repository. The PageBrain authors made weights, tokenizer and training text.
- **Date**: {made["date"]}

## What it is not

It is not a language model for use. It was trained only on the output of `tools/storyteller/story_grammar.py`: short,
English-like stories about invented people who lend, lose, exchange and find things. It has no knowledge of the
world, and it cannot answer questions or follow instructions. On other texts it produces nonsense.

## How it was made

```
{made["command"]}
```

- {made["corpus_stories"]:,} synthetic stories, {made["corpus_tokens"]:,} tokens; no text from elsewhere.
- {made["steps"]:,} steps of {made["batch_tokens"]:,} tokens; AdamW, cosine schedule from learning rate
  {made["peak_learning_rate"]}; {made["precision"]}; seed {made["seed"]}.
- {made["training_minutes"]:.1f} minutes of training on {made["hardware"]}, torch {made["torch"]}.
- Stories are packed into rows of {made["n_positions"]} positions with `{END_OF_TEXT}` between them. Half of the
  rows begin with a story, without this token. So the model takes a prompt with or without it.
- Training is deterministic. The same seed, machine and versions give the same weights, bit for bit.
  `tests/tools/test_bundled_model.py` checks this on a short run. SHA-256 of `model.safetensors`:
  `{made["weights_sha256"]}`.

## Measurements

All numbers are in `metrics.json`, which the command above writes.
`python -m tools.storyteller.evaluate pagebrain/assets/storyteller` measures a saved model again.

| {found["heldout_stories"]:,} fresh stories, {found["heldout_tokens"]:,} tokens | nats per token | perplexity |
| --- | --- | --- |
| this model | {found["loss_nats_per_token"]:.4f} | {found["perplexity_per_token"]:.2f} |
| bigram model (add-0.1) of the same training tokens | {found["bigram_loss_nats_per_token"]:.4f} \
| {found["bigram_perplexity_per_token"]:.2f} |

On stories about held-out pairs of name and object the loss is {found["loss_heldout_pairs"]:.4f}. In packed
rows it is {positions}. The loss is highest at the
first positions, because every row begins with a story whose people have not been named yet.

**Memory.** A tenth of all (name, object) pairs do not occur together in any training story. At some places a
story must repeat an earlier detail. A mention counts as remembered if each of its tokens is the model's first
choice (teacher-forced). The table gives the share of such mentions:

| what must be remembered | pairs seen in training | held-out pairs |
| --- | --- | --- |
{recall_rows}

**Samples.** {found["samples"]} stories from `{END_OF_TEXT}` at temperature {found["sample_temperature"]}:

| | |
| --- | --- |
| exact 20-gram overlap with the training text (tokens) | {_percent(found["sample_20gram_overlap"])} |
| the same for fresh stories of the grammar itself | {_percent(found["fresh_grammar_20gram_overlap"])} |
| end by themselves in under 400 tokens | {_percent(found["samples_ending_within_400_tokens"])} |
| distinct | {_percent(found["samples_distinct"])} |
| every quotation closed | {_percent(found["samples_with_closed_quotes"])} |
| one person in two roles, or a person too many (the grammar: none) | {_percent(found["samples_miscast"])} |
| mean length in tokens | {found["samples_mean_tokens"]:.0f} |
| titled with a held-out pair, use both name and object at least twice | {_percent(kept)} |

The overlap comes from the grammar's fixed sentence patterns. Names, objects and details vary, and phrases
do not.

## Three samples: the first of the {found["samples"]}

{samples}
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are those of the bundled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-stories", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-rows", type=int, default=64, help="rows of 1024 positions per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--eval-stories", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--date", default="2026-11-22", help="the date that the model card gives")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _hardware(device: torch.device) -> str:
    return f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # cuBLAS is deterministic only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    # Few stories are generated faster than processes start.
    workers = available_cores() if args.corpus_stories > 5000 else 1
    texts = list(generate_texts(args.seed, args.corpus_stories, workers=workers))
    tokenizer = train_tokenizer(texts[:TOKENIZER_STORIES])
    eos = end_of_text_id(tokenizer)
    corpus = encode_texts(tokenizer, texts)
    corpus_tokens = sum(len(document) + 1 for document in corpus)
    print(f"{len(texts)} stories, {corpus_tokens} tokens", flush=True)

    model = new_model(tokenizer).to(device)  # type: ignore[arg-type]
    rows = packed_rows(corpus, eos, N_POSITIONS + 1, np.random.default_rng(args.seed))
    started = time.perf_counter()
    last_loss = train(model, rows, args.steps, args.batch_rows, args.lr)
    minutes = (time.perf_counter() - started) / 60

    # The weights are final now, and sampling needs operations that do not make that promise.
    torch.use_deterministic_algorithms(False)
    evaluation = measure(model, tokenizer, corpus, args.eval_stories, args.samples, args.seed)
    fresh = encode_texts(tokenizer, generate_texts(HELDOUT_SEED, max(args.eval_stories, 20)))
    fresh_rows = packed_rows(fresh, eos, N_POSITIONS + 1, np.random.default_rng(args.seed))
    some_rows = np.stack([next(fresh_rows) for _ in range(max(1, args.eval_stories // 10))])
    spans = ((0, 128), (384, 512), (896, 1024))
    evaluation["packed_loss_by_position"] = loss_by_position(model, some_rows, spans)

    save(model, tokenizer, args.out)
    training = {
        "command": "python -m tools.storyteller.train " + " ".join(sys.argv[1:] if argv is None else argv),
        "date": args.date,
        "seed": args.seed,
        "corpus_stories": args.corpus_stories,
        "corpus_tokens": corpus_tokens,
        "vocab_size": tokenizer.get_vocab_size(),
        "n_positions": N_POSITIONS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": args.steps,
        "batch_tokens": args.batch_rows * N_POSITIONS,
        "peak_learning_rate": args.lr,
        "precision": "bfloat16 autocast over float32 weights" if device.type == "cuda" else "float32",
        "training_minutes": minutes,
        "last_training_loss": last_loss,
        "hardware": _hardware(device),
        "torch": torch.__version__.split("+")[0],
        "weights_sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
    }
    metrics = {"training": training, "evaluation": evaluation}
    text = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    (args.out / "metrics.json").write_text(text, encoding="utf-8")
    (args.out / "README.md").write_text(model_card(metrics), encoding="utf-8")


if __name__ == "__main__":
    main()
