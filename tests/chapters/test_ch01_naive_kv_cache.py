"""Chapter 01: the reserved cache, attention over it, and the batch, compared with Hugging Face and its own cache."""

import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from chapters.aids.new_tensors import NewTensors
from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hints import hint
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
    """Which new token has this K or V ``[num_heads, head_dim]``, in words; empty if none has."""
    for kind, tensor in (("key", key), ("value", value)):
        same = (tensor == found).all(dim=-1).all(dim=-1).nonzero().tolist()
        if same:
            return f"the {kind.upper()} of new token {same[0][1]} of sequence {same[0][0]}"
    return ""


def assert_writes(cache: Any, layer: int, positions: list[list[int]], seed: int) -> None:
    """One write; afterwards the new tokens are at their positions, and everything else is as it was."""
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

    given = torch.tensor(positions)
    arguments = {"positions": given, "key": key, "value": value}
    copies = {name: tensor.clone() for name, tensor in arguments.items()}
    cache.write(layer, given, key, value)
    with hint("The arguments belong to the caller, who uses them again after the write. Compute slots in a new tensor."):
        for name, tensor in arguments.items():
            assert torch.equal(tensor, copies[name]), f"write changed its argument {name}: it must only read"
    for name in expected:
        got = getattr(cache, name)

        def where(index: tuple[int, ...], got: Tensor = got, before: Tensor = before[name], name: str = name) -> str:
            lies = got[index[:3]]
            found = f", but this place holds {name_of(lies, key, value)}" if name_of(lies, key, value) else ""
            if index[0] != layer or index[1:3] not in belongs:
                written = f"the write was to layer {layer}, positions {positions[index[1]]} of sequence {index[1]}"
                return f"this place must stay as it was: {written}{found}"
            held = f"; before the write it held {float(before[index]):g}"
            nothing = f", but cache.{name} did not change at all (indexing with a tensor makes a copy; assign to the cache)"
            unwritten = nothing if torch.equal(got, before) else found or held
            token = f"the {name[:-1]} of new token {belongs[index[1], index[2]]} of sequence {index[1]}"
            return f"{token} belongs here{unwritten}"

        assert got.dtype == new.dtype, f"write changed the dtype of cache.{name} from {new.dtype} to {got.dtype}"
        axes = ("layer", "sequence", "position", "head", "dim")
        assert_same(got, expected[name], what=f"cache.{name} after a write", axes=axes, atol=0, where=where)


@pytest.mark.task("1.1", hint="One token of one sequence is written. Compare what belongs at this place with what is there.")
def test_keys_go_to_the_keys_and_values_to_the_values(chapter: Any, seed: int) -> None:
    assert_writes(poisoned_cache(chapter, 1), 0, [[0]], seed)
    assert_writes(poisoned_cache(chapter, 1), 2, [[4]], seed)


@pytest.mark.task("1.1", hint="Each sequence has its own positions: new token t of sequence b goes to positions[b, t].")
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


@pytest.mark.task(
    "1.1",
    hint="A write changes its layer and its positions only, and replaces what was there. The positions of this call count, "
    "not those of an earlier one.",
)
def test_later_writes_keep_earlier_tokens_and_replace_padding(chapter: Any, seed: int) -> None:
    cache = poisoned_cache(chapter, 3)
    steps = [[[0, 1, 2, 3]] * 3, [[4], [1], [3]], [[5], [2], [4]]]  # sequence 1 has a prompt of 1 token, padded to 4
    for step, positions in enumerate(steps):
        for layer in range(NUM_LAYERS):
            assert_writes(cache, layer, positions, seed + 10 * step + layer)


@pytest.mark.task(
    "1.1",
    hint="Assign into the tensors that are there, at the new tokens' places. Do not make a new cache, layer or row.",
)
def test_a_write_copies_no_more_than_the_new_tokens(chapter: Any, seed: int) -> None:
    max_len = 300
    base = random_gpt2(n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_embd=NUM_HEADS * HEAD_DIM, n_positions=max_len)
    cache = chapter.ReservedCache(base, 4, max_len)
    keys, values = cache.keys, cache.values
    key, value = drawn(seed, 2, 4, 2, NUM_HEADS, HEAD_DIM)
    positions = torch.tensor([[3, 4], [297, 298], [0, 1], [150, 151]])
    with NewTensors() as made:
        cache.write(1, positions, key, value)
    for name, was in (("keys", keys), ("values", values)):
        assert getattr(cache, name).data_ptr() == was.data_ptr(), f"write put another tensor in the place of cache.{name}"
    row = max_len * NUM_HEADS * HEAD_DIM
    assert made.largest < row, (
        f"to write {key.numel()} keys and as many values, write made a tensor of {made.largest} numbers; "
        f"all that is reserved for one sequence in one layer is {row}"
    )


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


NOT_A_NUMBER = (
    "NaN comes from inf / inf, 0 / 0 or inf - inf: does exp get large numbers, is a maximum or a sum taken over hidden "
    "slots too, and does each query see at least one slot?"
)


def other_precision(out: Tensor, given: Given, scale: float) -> str:
    """Whether the outputs are right but for rounding in float32, in words; else empty."""
    apart = (out - attend_one_by_one(*given, scale)).abs().max()
    return "right up to the rounding of float32: some step converts float64 numbers to float32" if apart < 1e-5 else ""


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
        return "not a number"
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
        "hidden slots had a fixed score, such as 0, that is not below all visible ones": scores.masked_fill(
            hidden, 0
        ).softmax(-1),
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

    A mistake that one of ``leave`` explains is not reported here, because another test is about it.
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
        for explain in (other_precision, other_scale, other_mask, other_order):
            if words := explain(out.double(), given, scale):
                return words
        stands = f"this query has position {positions[index[0]][index[1]]} and sees the slots up to it, of {MAX_LEN}"
        return f"{stands}; the last written slot is {max(positions[index[0]])}, those past it hold {poison:g} or {-poison:g}"

    axes = ("sequence", "new token", "head", "dim")
    with contextlib.ExitStack() as hints:
        if isinstance(out, Tensor) and out.shape == expected.shape:
            if any(explain(out.double(), given, scale) for explain in leave):
                return
            if out.isnan().any():
                hints.enter_context(hint("Find the step that makes the NaN. " + NOT_A_NUMBER))
            elif other_precision(out.double(), given, scale):
                hints.enter_context(
                    hint("Compute everything in the dtype of the query: no float(), and no float32 constants.")
                )
        assert_same(out, expected, what="the attention outputs", axes=axes, where=seen)


@pytest.mark.task("1.2", hint="The positions of this call decide. Keep no mask from an earlier call.")
def test_an_earlier_call_leaves_nothing_behind(chapter: Any, seed: int) -> None:
    query, keys, values = (drawn(seed + index, 2, size, 3, 4) for index, size in enumerate((1, MAX_LEN, MAX_LEN)))
    positions = torch.tensor([[2], [5]])
    for step in range(3):
        with hint("Check the axes (heads, new tokens, slots) in each product, in the mask and in the softmax."):
            out = chapter.masked_attention(query, keys, values, positions, 0.5)
        expected = attend_one_by_one(query, keys, values, positions, 0.5)
        if step == 0 and not (out.shape == expected.shape and torch.allclose(out, expected, atol=1e-9, rtol=0)):
            return  # wrong in its first call: see the other tests
        what = f"call {step} with positions {positions.tolist()}, which were changed in place: the attention outputs"
        assert_same(out, expected, what=what, axes=("sequence", "new token", "head", "dim"))
        positions += 1


@pytest.mark.task(
    "1.2",
    hint="Every slot is visible here, so the mask hides nothing. Check the axes (heads, new tokens, slots) in each product, "
    "in the softmax and in the output.",
)
@pytest.mark.parametrize("num_new", [1, 2, 3])
def test_the_output_is_laid_out_like_the_query(chapter: Any, seed: int, num_new: int) -> None:
    assert_attends(chapter, [[MAX_LEN - 1] * num_new] * 2, seed, leave=(other_scale, other_mask))


@pytest.mark.task("1.2", hint="Multiply the scores by the argument scale, once. It need not be 1 / sqrt(head_dim).")
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
        [[8, 2], [3, 1]],
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
        "the largest is not the last",
    ],
)
def test_a_query_sees_positions_up_to_its_own(chapter: Any, seed: int, positions: list[list[int]]) -> None:
    assert_attends(chapter, positions, seed)


@pytest.mark.task(
    "1.2", hint="The content of a hidden slot must not matter: its weight is exactly zero, whatever its score."
)
@pytest.mark.parametrize("poison", [0.0, 1e4, 1e12, 1e30])
def test_hidden_slots_may_hold_anything(chapter: Any, seed: int, poison: float) -> None:
    assert_attends(chapter, [[1, 2], [5, 6], [6, 7]], seed, poison=poison)


@pytest.mark.task(
    "1.2",
    hint="Visible scores may be far from zero. A hidden slot needs a lower score than any visible one can have, and exp "
    "overflows unless the maximum of the visible scores is subtracted first.",
)
@pytest.mark.parametrize("stretch", [3e4, -3e4, 1e13, -1e13])
def test_scores_far_from_zero_hide_and_show_the_same_slots(chapter: Any, seed: int, stretch: float) -> None:
    assert_attends(chapter, [[0, 1], [2, 3], [4, 5]], seed, stretch=stretch)


@pytest.mark.task("1.2", hint="A model may have one head only. Remove the axes that you added, and no axis of length one.")
@pytest.mark.parametrize("num_heads", [1, 2])
def test_any_number_of_heads(chapter: Any, seed: int, num_heads: int) -> None:
    query, keys, values = (drawn(seed + index, 2, size, num_heads, 5) for index, size in enumerate((2, MAX_LEN, MAX_LEN)))
    positions = torch.tensor([[2, 3], [5, 6]])
    out = chapter.masked_attention(query, keys, values, positions, 0.5)
    expected = attend_one_by_one(query, keys, values, positions, 0.5)
    what = f"with {num_heads} heads: the attention outputs"
    assert_same(out, expected, what=what, axes=("sequence", "new token", "head", "dim"))


@pytest.mark.task("1.2", hint="The output has the dtype of the query. A mask or a constant of another dtype can change it.")
def test_float32_stays_float32(chapter: Any, seed: int) -> None:
    query, kv = drawn(seed, 2, 1, NUM_HEADS, HEAD_DIM).float(), drawn(seed, 2, MAX_LEN, NUM_HEADS, HEAD_DIM).float()
    positions = torch.tensor([[3], [5]])
    out = chapter.masked_attention(query, kv, kv, positions, 0.5)
    assert out.dtype == torch.float32, f"queries, keys and values are float32, but the output is {out.dtype}"
    axes = ("sequence", "new token", "head", "dim")
    assert_same(out, attend_one_by_one(query, kv, kv, positions, 0.5), what="the attention outputs", axes=axes, atol=1e-4)


TEXTS: list[Sequence[Sequence[int]]] = [
    [[5, 6, 7]],
    [[1, 2], [3, 4, 5, 6, 7, 8], [9, 9, 9]],
    [[4]],
    [[3, 1], [2, 1], [1, 1], [0, 1]],
    [[8, 0], [0], [5, 0, 0]],
    [[1, 2, 3] * 700, [4]],
    ((3, 1, 4), (1, 5)),
    [(9,), [2, 6]],
]


def assert_decodes(chapter: Any, seed: int, index: int, name: str, expected: Callable[[Any], Any]) -> None:
    """One of the three tensors that ``decode_inputs`` returns."""
    dice = random.Random(seed)
    drawn = [[dice.choices(range(97), k=dice.randint(1, 12)) for _ in range(dice.randint(1, 6))] for _ in range(5)]
    for texts in [*TEXTS, *drawn]:
        given = copy.deepcopy(texts)
        with hint("Texts are sequences, lists or tuples. Use only what both have: len, an index, a loop."):
            returned = chapter.decode_inputs(given)
        with hint("Only read the texts: they belong to the caller."):
            assert given == texts, f"decode_inputs changed the texts from {texts} to {given}"
        shown = f"{texts!r:.90}"
        assert isinstance(returned, (tuple, list)) and len(returned) == 3, (
            f"decode_inputs({shown}) returned a {type(returned).__name__}, expected token_ids, positions and last_rows"
        )
        got, about, wanted = returned[index], f"decode_inputs({shown}): {name}", expected(texts)
        assert isinstance(got, Tensor), f"{about} is of type {type(got).__name__}, expected a tensor"
        assert got.dtype == torch.int64, f"{about} has dtype {got.dtype}, expected int64, as prefill_inputs returns it"
        assert got.tolist() == wanted, f"{about} is {got.tolist()}, expected {wanted}"


@pytest.mark.task("1.3", hint="token_ids has one row for each text and one column: the newest token, the last of the text.")
def test_the_newest_token_of_each_text_comes_next(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 0, "token_ids", lambda texts: [[text[-1]] for text in texts])


@pytest.mark.task("1.3", hint="The first token of a text has position 0. Which position has the last of n tokens?")
def test_the_newest_token_stands_at_the_end_of_its_text(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 1, "positions", lambda texts: [[len(text) - 1] for text in texts])


@pytest.mark.task(
    "1.3",
    hint="last_rows are row numbers in the flat batch. In a decode step each text has one row there, whatever its length.",
)
def test_the_last_row_of_each_text_is_its_only_one(chapter: Any, seed: int) -> None:
    assert_decodes(chapter, seed, 2, "last_rows", lambda texts: list(range(len(texts))))


@pytest.mark.task(
    "1.3",
    hint="The first step computes the whole prompts. Each later step computes the newest token of each text.",
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
        """Keeps the cache of the batch; slots that were never written hold poison."""

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
        # Hugging Face is given the text that was generated here, so that the first mistake is named.
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


NUM_PROMPT = [2, 6, 3, 6, 2, 9]
NUM_ANSWER = [211, 266, 191, 71, 178, 162]
"""Tokens of the notebook's six stories; ``tests/chapters/test_measured_runs.py`` generates them."""


@pytest.mark.task("1.4", hint="Measure with the run and the definition of useful that the task gives.")
def test_the_useful_share_of_the_reserved_slots(chapter: Any, seed: int, record_property: Any) -> None:
    steps = range(max(NUM_ANSWER))
    reserved = len(NUM_PROMPT) * (max(NUM_PROMPT) + 400) * len(steps)
    useful = sum(
        prompt + step for step in steps for prompt, answer in zip(NUM_PROMPT, NUM_ANSWER, strict=True) if step < answer
    )
    assert_answer(
        chapter.answer_1_4,
        100 * useful / reserved,
        0.055,  # one decimal; an average that is off by one token or one step is further away
        record_property,
        {
            "high": "Too high: are slots of stories that are over counted, or slots that are reserved and not yet written? "
            "Is the sum divided by the slots of all steps?",
            "low": "Too low: the answer is in percent, and the average is over the steps of the run: as many as the longest "
            "answer has tokens.",
        },
    )
