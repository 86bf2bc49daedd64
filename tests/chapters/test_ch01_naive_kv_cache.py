"""Chapter 01: the reserved cache, attention over it, and the batch, held against Hugging Face down to its own cache."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.departures import assert_same, assert_same_tokens
from tests.support.models import POISON, hf_cache, hf_greedy, hf_logits, random_gpt2

CHAPTER = "01"
NUM_LAYERS, NUM_HEADS, HEAD_DIM, MAX_LEN = 3, 3, 4, 9
PROMPTS = [[1, 2, 3], [7, 8] * 8 + [9], [40, 41, 42], list(range(25)), [95]]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned_cache(chapter: Any, batch_size: int, dtype: torch.dtype = torch.float64) -> Any:
    base = random_gpt2(dtype, n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_embd=NUM_HEADS * HEAD_DIM)
    cache = chapter.ReservedCache(base, batch_size, MAX_LEN)
    cache.keys.fill_(POISON)
    cache.values.fill_(-POISON)
    return cache


def name_of(found: Tensor, key: Tensor, value: Tensor) -> str:
    """Whose K or V ``[num_heads, head_dim]`` it is, among those of the new tokens; empty if it is nobody's."""
    for kind, tensor in (("key", key), ("value", value)):
        same = (tensor == found).all(dim=-1).all(dim=-1).nonzero().tolist()
        if same:
            return f"the {kind.upper()} of new token {same[0][1]} of sequence {same[0][0]}"
    return ""


def assert_writes(cache: Any, layer: int, positions: list[list[int]], seed: int) -> None:
    """One write; afterwards the new tokens are where they belong, and everything else is as it was."""
    batch_size, num_new = len(positions), len(positions[0])
    new = drawn(seed, batch_size, num_new, 3, NUM_HEADS, HEAD_DIM, dtype=cache.keys.dtype)
    key, value = new[:, :, 1], new[:, :, 2]  # strided, as they come out of one projection
    before = {"keys": cache.keys.clone(), "values": cache.values.clone()}
    expected = {name: tensor.clone() for name, tensor in before.items()}
    belongs: dict[tuple[int, int], int] = {}
    for b in range(batch_size):
        for t, position in enumerate(positions[b]):
            expected["keys"][layer, b, position] = key[b, t]
            expected["values"][layer, b, position] = value[b, t]
            belongs[b, position] = t

    cache.write(layer, torch.tensor(positions), key, value)
    for name in expected:
        got = getattr(cache, name)

        def where(index: tuple[int, ...], got: Tensor = got, before: Tensor = before[name], name: str = name) -> str:
            lies = got[index[:3]]
            found = f", but what lies here is {name_of(lies, key, value)}" if name_of(lies, key, value) else ""
            if index[0] != layer or index[1:3] not in belongs:
                written = f"the write was to layer {layer}, positions {positions[index[1]]} of sequence {index[1]}"
                return f"nothing was to be written here: {written}{found}"
            held = f"; before the write it held {float(before[index]):g}"
            nothing = (
                ", but nothing was written to the cache (indexing with a tensor makes a copy; assign to the cache itself)"
            )
            unwritten = nothing if torch.equal(lies, before[index[:3]]) else found or held
            token = f"the {name[:-1]} of new token {belongs[index[1], index[2]]} of sequence {index[1]}"
            return f"{token} belongs here{unwritten}"

        assert got.dtype == new.dtype, f"write changed the dtype of cache.{name} from {new.dtype} to {got.dtype}"
        axes = ("layer", "sequence", "position", "head", "dim")
        assert_same(got, expected[name], what=f"cache.{name} after a write", axes=axes, atol=0, where=where)


@pytest.mark.task(
    "1.1", hint="One token of one sequence: see what should lie here and what does: key or value, which token, which layer."
)
def test_keys_go_to_the_keys_and_values_to_the_values(chapter: Any, seed: int) -> None:
    assert_writes(poisoned_cache(chapter, 1), 0, [[0]], seed)
    assert_writes(poisoned_cache(chapter, 1), 2, [[4]], seed)


@pytest.mark.task("1.1", hint="Every sequence has positions of its own, and each new token t of it goes to positions[b, t].")
@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1, 2, 3]] * 2,
        [[4], [0], [8]],
        [[3, 4, 5], [0, 1, 2], [6, 7, 8]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8]],
        [[8]],
        [[7, 2], [0, 8], [5, 4], [1, 6]],
    ],
    ids=["prefill", "decode", "chunks at different places", "one full sequence", "last slot", "not consecutive"],
)
def test_new_tokens_land_at_their_positions(chapter: Any, seed: int, positions: list[list[int]]) -> None:
    for layer in range(NUM_LAYERS):
        assert_writes(poisoned_cache(chapter, len(positions)), layer, positions, seed)


@pytest.mark.task("1.1", hint="A write touches its layer and its positions, and replaces what was there.")
def test_later_writes_keep_earlier_tokens_and_replace_padding(chapter: Any, seed: int) -> None:
    cache = poisoned_cache(chapter, 3)
    steps = [[[0, 1, 2, 3]] * 3, [[4], [1], [3]], [[5], [2], [4]]]  # sequence 1 has a prompt of 1 token, padded to 4
    for step, positions in enumerate(steps):
        for layer in range(NUM_LAYERS):
            assert_writes(cache, layer, positions, seed + 10 * step + layer)


@pytest.mark.task("1.1", hint="The cache has the model's dtype and keeps it.")
def test_a_float32_cache_stays_float32(chapter: Any, seed: int) -> None:
    assert_writes(poisoned_cache(chapter, 2, torch.float32), 1, [[2, 3], [5, 6]], seed)


def attend_one_by_one(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention as its definition says it, one query at a time over exactly the slots that it sees."""
    out = torch.zeros_like(query)
    for b, t in torch.cartesian_prod(torch.arange(len(query)), torch.arange(query.shape[1])).tolist():
        seen = int(positions[b, t]) + 1
        scores = (keys[b, :seen] * query[b, t]).sum(-1) * scale  # [seen, num_heads]
        out[b, t] = (scores.softmax(0).unsqueeze(-1) * values[b, :seen]).sum(0)
    return out


Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""The query, the keys, the values and the positions."""


def other_scale(out: Tensor, given: Given, scale: float) -> str:
    """What the scores were multiplied by, in words, if that explains the outputs; else empty."""
    root = HEAD_DIM**-0.5
    others = {f"1 / sqrt(head_dim) = {root:g}": root, "1": 1.0, "scale * scale": scale**2, "1 / scale": 1 / scale}
    for name, other in others.items():
        if other != scale and torch.allclose(out, attend_one_by_one(*given, other), atol=1e-9, rtol=0):
            return f"these are the outputs of scores times {name}, but the argument scale is {scale:g}"
    return ""


def other_mask(out: Tensor, given: Given, scale: float) -> str:
    """Which slots the queries saw, in words, if that explains the outputs; else empty."""
    if out.isnan().any():
        return "not a number, as a softmax gives if all scores are -inf: such a query sees no slot at all"
    query, keys, values, positions = given
    whole = positions.amax(1, keepdim=True).expand_as(positions)
    everything = "all slots, as if there were no mask, or one for the whole sequence"
    seen = {everything: torch.full_like(positions, MAX_LEN - 1)}
    seen["all slots up to that of its sequence's last new token"] = whole
    seen["what the first sequence's queries may see"] = positions[:1].expand_as(positions)
    seen["slots by its number among the new tokens, and not by its position"] = torch.arange(positions.shape[1]).expand_as(
        positions
    )
    seen["one slot too many, that of the next position"] = (positions + 1).clamp(max=MAX_LEN - 1)
    if positions.min() > 0:
        seen["one slot too few, not that of its own position"] = positions - 1
    for name, last in seen.items():
        outputs = attend_one_by_one(query, keys, values, last, scale)
        if not last.equal(positions) and torch.allclose(out, outputs, atol=1e-9, rtol=0):
            return f"these are the outputs if each query sees {name}"
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(MAX_LEN) > positions.unsqueeze(-1)).unsqueeze(1)
    others = {
        "hidden slots had a score of 0, which counts like any other": scores.masked_fill(hidden, 0).softmax(-1),
        "weights were cut after the softmax, so that they do not add up to 1": scores.softmax(-1).masked_fill(hidden, 0),
    }
    for name, weights in others.items():
        if torch.allclose(out, torch.einsum("bhqk,bkhd->bqhd", weights, values), atol=1e-9, rtol=0):
            return f"these are the outputs if {name}"
    return ""


def other_order(out: Tensor, given: Given, scale: float) -> str:
    """In which order of axes the outputs are the right ones, in words; empty if in none that is known here."""
    unmoved = attend_one_by_one(*given, scale).transpose(1, 2).reshape(out.shape)
    right = torch.allclose(out, unmoved, atol=1e-9, rtol=0)
    order = "[batch_size, num_heads, num_new, head_dim]"
    return f"these are the right numbers in the order {order}: an axis was not moved back" if right else ""


def assert_attends(
    chapter: Any,
    positions: list[list[int]],
    seed: int,
    scale: float = 0.37,
    stretch: float = 1.0,
    poison: float = POISON,
    leave: tuple[Callable[[Tensor, Given, float], str], ...] = (),
) -> None:
    """``masked_attention`` against the definition; slots that no query of a sequence sees hold poison of either sign.

    What one of ``leave`` explains is left to other tests, which are about just that.
    """
    where = torch.tensor(positions)
    query = drawn(seed, *where.shape, NUM_HEADS, HEAD_DIM)
    keys = drawn(seed + 1, len(positions), MAX_LEN, NUM_HEADS, HEAD_DIM)
    if stretch != 1:  # all visible scores far from zero, on the side that stretch says
        query, keys = query.abs() * stretch, keys.abs()
    values = drawn(seed + 2, len(positions), MAX_LEN, NUM_HEADS, HEAD_DIM)
    for b in range(len(positions)):
        past = slice(max(positions[b]) + 1, None)
        keys[b, past] = drawn(seed + 3, MAX_LEN, NUM_HEADS, HEAD_DIM)[past].sign() * poison
        values[b, past] = drawn(seed + 4, MAX_LEN, NUM_HEADS, HEAD_DIM)[past].sign() * poison
    given = (query, keys, values, where)
    expected, before = attend_one_by_one(*given, scale), [tensor.clone() for tensor in given]
    out = chapter.masked_attention(*given, scale)
    for name, now, was in zip(("query", "keys", "values", "positions"), given, before, strict=True):
        assert torch.equal(now, was), f"masked_attention changed its argument {name}: it must only read"

    def seen(index: tuple[int, ...]) -> str:
        for explain in (other_scale, other_mask, other_order):
            if words := explain(out.double(), given, scale):
                return words
        stands = f"this query stands at position {positions[index[0]][index[1]]} and sees the slots up to it, of {MAX_LEN}"
        return f"{stands}; the last written slot is {max(positions[index[0]])}, those past it hold {poison:g} or {-poison:g}"

    axes = ("sequence", "new token", "head", "dim")
    if isinstance(out, Tensor) and out.shape == expected.shape:
        if any(explain(out.double(), given, scale) for explain in leave):
            return
    assert_same(out, expected, what="the attention outputs", axes=axes, where=seen)


@pytest.mark.task(
    "1.2",
    hint="Every slot is visible here: see which axes stand for heads, new tokens and slots in each "
    "product, in the softmax, and in what you return.",
)
@pytest.mark.parametrize("num_new", [1, 2, 3])
def test_the_output_is_laid_out_like_the_query(chapter: Any, seed: int, num_new: int) -> None:
    assert_attends(chapter, [[MAX_LEN - 1] * num_new] * 2, seed, leave=(other_scale, other_mask))


@pytest.mark.task("1.2", hint="The scores are multiplied by the argument scale, once, whatever it is.")
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.01, 3.0])
def test_scores_are_scaled_by_what_is_given(chapter: Any, seed: int, scale: float) -> None:
    assert_attends(chapter, [[MAX_LEN - 1], [MAX_LEN - 1]], seed, scale=scale, leave=(other_mask,))  # every slot is visible


@pytest.mark.task("1.2", hint="Each query of each sequence sees the slots up to its own position, and no others.")
@pytest.mark.parametrize(
    "positions",
    [
        [[0]],
        [[8]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8]],
        [[0, 1], [0, 1], [0, 1]],
        [[4], [0], [8], [1]],
        [[3, 4, 5], [0, 1, 2], [6, 7, 8]],
        [[3, 4, 5, 6], [1, 2, 3, 4]],
        [[7, 2], [0, 8], [5, 4]],
    ],
    ids=[
        "first slot",
        "last slot",
        "full",
        "as many sequences as heads",
        "decode at different places",
        "chunks",
        "more new tokens than heads",
        "not consecutive",
    ],
)
def test_a_query_sees_positions_up_to_its_own(chapter: Any, seed: int, positions: list[list[int]]) -> None:
    assert_attends(chapter, positions, seed)


@pytest.mark.task(
    "1.2", hint="What a hidden slot holds must not matter at all: its weight is exactly zero, whatever its score."
)
@pytest.mark.parametrize("poison", [0.0, 1e4, 1e12, 1e30])
def test_hidden_slots_may_hold_anything(chapter: Any, seed: int, poison: float) -> None:
    assert_attends(chapter, [[1, 2], [5, 6], [6, 7]], seed, poison=poison)


@pytest.mark.task("1.2", hint="Scores may be far from zero: hide a slot by a score that no visible one can be below.")
@pytest.mark.parametrize("stretch", [3e4, -3e4])
def test_scores_far_from_zero_hide_and_show_the_same_slots(chapter: Any, seed: int, stretch: float) -> None:
    assert_attends(chapter, [[0, 1], [2, 3], [4, 5]], seed, stretch=stretch)


@pytest.mark.task("1.2", hint="The output has the dtype of the query; a mask of another dtype can change it on the way.")
def test_float32_stays_float32(chapter: Any, seed: int) -> None:
    query, kv = drawn(seed, 2, 1, NUM_HEADS, HEAD_DIM).float(), drawn(seed, 2, MAX_LEN, NUM_HEADS, HEAD_DIM).float()
    positions = torch.tensor([[3], [5]])
    out = chapter.masked_attention(query, kv, kv, positions, 0.5)
    assert out.dtype == torch.float32, f"queries, keys and values are float32, but the output is {out.dtype}"
    axes = ("sequence", "new token", "head", "dim")
    assert_same(out, attend_one_by_one(query, kv, kv, positions, 0.5), what="the attention outputs", axes=axes, atol=1e-4)


TEXTS = [
    [[5, 6, 7]],
    [[1, 2], [3, 4, 5, 6, 7, 8], [9, 9, 9]],
    [[4]],
    [[3, 1], [2, 1], [1, 1], [0, 1]],
    [[8, 0], [0], [5, 0, 0]],
]


def assert_decodes(chapter: Any, seed: int, index: int, name: str, expected: Callable[[list[list[int]]], Any]) -> None:
    """One of the three tensors that ``decode_inputs`` returns."""
    dice = random.Random(seed)
    drawn = [[dice.choices(range(97), k=dice.randint(1, 12)) for _ in range(dice.randint(1, 6))] for _ in range(5)]
    for texts in [*TEXTS, *drawn]:
        given = [list(text) for text in texts]
        returned = chapter.decode_inputs(given)
        assert given == texts, f"decode_inputs changed the texts from {texts} to {given}"
        assert isinstance(returned, (tuple, list)) and len(returned) == 3, (
            f"decode_inputs({texts}) returned a {type(returned).__name__}, expected token_ids, positions and last_rows"
        )
        got, about, wanted = returned[index], f"decode_inputs({texts}): {name}", expected(texts)
        assert isinstance(got, Tensor), f"{about} is of type {type(got).__name__}, expected a tensor"
        assert got.dtype == torch.int64, f"{about} has dtype {got.dtype}, expected int64, as prefill_inputs returns it"
        assert got.tolist() == wanted, f"{about} is {got.tolist()}, expected {wanted}"


@pytest.mark.task("1.3", hint="token_ids has a row for each text, of width one: the newest token, which is the text's last.")
def test_the_newest_token_of_each_text_comes_next(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 0, "token_ids", lambda texts: [[text[-1]] for text in texts])


@pytest.mark.task("1.3", hint="The first token of a text stands at position 0: where does the last of n tokens stand?")
def test_the_newest_token_stands_at_the_end_of_its_text(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 1, "positions", lambda texts: [[len(text) - 1] for text in texts])


@pytest.mark.task(
    "1.3",
    hint="last_rows are row numbers of the flat batch, in which each text has as many rows as new tokens: one here. How "
    "long the text is does not matter.",
)
def test_the_last_row_of_each_text_is_its_only_one(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 2, "last_rows", lambda texts: list(range(len(texts))))


@pytest.mark.task(
    "1.3", hint="Prefill fed the whole prompts; each later step feeds one token per text, at the place it has in it."
)
@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ({}, 14),
        ({"n_head": 1, "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, 14),
        ({"scale_attn_weights": False}, 2),
    ],
    ids=["plain", "scaled by layer", "unscaled"],
)
def test_the_batch_computes_what_hugging_face_computes(
    chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], count: int
) -> None:
    caches: list[Any] = []

    class Poisoned(chapter.ReservedCache):  # type: ignore[misc]
        """What the batch leaves in its cache can be looked at; slots that were never written hold poison."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.keys.fill_(POISON)
            self.values.fill_(POISON)
            caches.append(self)

    monkeypatch.setattr(chapter, "ReservedCache", Poisoned)
    base = random_gpt2(seed=seed, tie_word_embeddings=False, **shape)
    end = hf_greedy(base, PROMPTS[1], 2)[-1]
    base.config.eos_token_id = end
    scores: list[list[Tensor]] = [[] for _ in PROMPTS]
    answers = chapter.generate(base, PROMPTS, count, lambda index, logits: scores[index].append(logits.clone()))
    assert len(answers) == len(PROMPTS), f"{len(PROMPTS)} prompts got {len(answers)} answers"
    for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        assert 1 <= len(answer) <= count, f"prompt {index}: the answer has {len(answer)} tokens, expected 1 to {count}"
        # Hugging Face is given the text as it was generated here, so that what goes wrong first is what is named.
        for name, expected in hf_cache(base, prompt + answer[:-1]).items():
            got = getattr(caches[0], name)[:, index, : len(expected)].transpose(0, 1)

            def slot(place: tuple[int, ...], got: Tensor = got, index: int = index, prompt: list[int] = prompt) -> str:
                kind = "a prompt token" if place[0] < len(prompt) else f"new token {place[0] - len(prompt)}"
                unwritten = ", which was never written" if got[place] == POISON else ""
                return f"{kind}: its place is slot {place[0]} of sequence {index}{unwritten}"

            what = f"prompt {index}: the cached {name}"
            assert_same(got, expected, what=what, axes=("token", "layer", "head", "dim"), where=slot)
        what = f"prompt {index}: the logits"
        expected_logits = hf_logits(base, prompt + answer)[len(prompt) - 1 : -1]
        assert_same(torch.stack(scores[index]), expected_logits, what=what, axes=("output token", "vocabulary entry"))
        assert_same_tokens(answer, hf_greedy(base, prompt, count, end), what=f"prompt {index}: the answer")
