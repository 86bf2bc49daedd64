"""Chapter 03: the online softmax, one query over its pages, and a batch of queries over theirs.

What a result must be is computed here in the textbook way, over all tokens in one piece. All slots that a query must not see
hold a large value. A failure names the first place that is wrong and, if it can, what was computed there instead.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from chapters import ch02_block_table
from pagebrain.engine.trace import StepTrace
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.models import POISON, hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "03"

Page = tuple[Tensor, Tensor]
"""Scores ``[..., num_heads, block_size]`` and values ``[..., block_size, num_heads, head_dim]``."""


def random_pages(seed: int, shifts: list[float], lead: tuple[int, ...] = (3,)) -> list[Page]:
    """One page for each of ``shifts``, a number that is added to all of its scores: it says which page has the maximum."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (*lead, 2, 4), (*lead, 4, 2, 5)
    pages = [tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes) for _ in shifts]
    return [(scores + shift, values) for (scores, values), shift in zip(pages, shifts, strict=True)]


def pages_with_hidden_slots(seed: int) -> list[Page]:
    """Three pages for three queries; hidden slots hold what nobody wants to see.

    Query 0 sees everything, query 1 a single slot of the first page, query 2 nothing of the second and third page.
    """
    pages = random_pages(seed, [0, 0, 0])
    everything = [0, 1, 2, 3]
    for page, query, slots in ((0, 1, [1, 2, 3]), (2, 1, [2, 3]), (0, 2, [0, 3]), (1, 2, everything), (2, 2, everything)):
        scores, values = pages[page]
        scores[query, :, slots] = -math.inf
        values[query, slots] = POISON
    return pages


def check_add_page(chapter: Any, pages: list[Page], names: tuple[str, ...] = ("maximum", "total", "acc")) -> None:
    """After each page, the three numbers, or those of ``names``, must be those of all pages so far taken together."""
    lead = pages[0][0].shape[:-2]
    axes = [*("batch", "query")[2 - len(lead) :], "head", "dim"]
    partial = chapter.Partial.start(torch.zeros(*lead, 2, 5, dtype=torch.float64))
    for number, (page_scores, page_values) in enumerate(pages):
        partial = chapter.add_page(partial, page_scores.clone(), page_values.clone())
        assert isinstance(partial, chapter.Partial), f"add_page must return a Partial, got {type(partial).__name__}"
        scores = torch.cat([scores for scores, _ in pages[: number + 1]], dim=-1)
        values = torch.cat([values for _, values in pages[: number + 1]], dim=-3)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        acc = (weights.transpose(-1, -2).unsqueeze(-1) * values).sum(-3)
        for name, expected in zip(partial._fields, (scores.amax(-1), weights.sum(-1), acc), strict=True):
            if name in names:
                what = f"the values of `{name}` after page {number}"
                assert_same(getattr(partial, name), expected, what=what, axes=axes[: expected.ndim])


def check_arguments_stay(chapter: Any, pages: list[Page]) -> None:
    """After the last page, all that was given to ``add_page`` or returned by it still is what it was."""
    partial = chapter.Partial.start(torch.zeros(*pages[0][0].shape[:-2], 2, 5, dtype=torch.float64))
    given: list[tuple[str, Tensor, Tensor]] = []
    for number, (scores, values) in enumerate(pages):
        tensors = {f"`partial.{name}`": getattr(partial, name) for name in partial._fields}
        tensors |= {"`scores`": scores.clone(), "`values`": values.clone()}
        given += [(f"{name} as given with page {number}", tensor, tensor.clone()) for name, tensor in tensors.items()]
        partial = chapter.add_page(partial, tensors["`scores`"], tensors["`values`"])
    for what, now, before in given:
        if not torch.equal(now, before):
            place = tuple(torch.nonzero(now != before)[0].tolist())
            was, became = f"{before[place]:.6g}", f"{now[place]:.6g}"
            raise AssertionError(f"{what} was changed by add_page: at {list(place)} it was {was}, now it is {became}")


@pytest.mark.task(
    "3.1",
    hint="Each query and head has a maximum of its own: over which dimension of scores is it taken? It may be negative.",
)
@pytest.mark.parametrize("shift", [0.0, -40.0, 40.0])
def test_the_first_page_gives_each_head_its_maximum(chapter: Any, seed: int, shift: float) -> None:
    check_add_page(chapter, random_pages(seed, [shift]), names=("maximum",))


@pytest.mark.task(
    "3.1",
    hint="A term is exp(score - maximum). The old maximum is minus infinity: is your factor 0 then? inf * 0 is nan.",
)
@pytest.mark.parametrize("shift", [0.0, -40.0, 40.0])
def test_the_first_page_starts_the_sums(chapter: Any, seed: int, shift: float) -> None:
    check_add_page(chapter, random_pages(seed, [shift]))


@pytest.mark.task("3.1", hint="What was summed before is relative to the old maximum; a larger one shrinks all of it.")
def test_a_page_with_a_larger_maximum_shrinks_what_was_summed(chapter: Any, seed: int) -> None:
    check_add_page(chapter, random_pages(seed, [0, 4, 8]))


@pytest.mark.task("3.1", hint="The maximum runs over all pages so far. A page of small scores does not lower it.")
def test_a_page_with_a_smaller_maximum_leaves_it(chapter: Any, seed: int) -> None:
    check_add_page(chapter, random_pages(seed, [8, 4, 0]))


@pytest.mark.task("3.1", hint="Every exponent must be at most 0: take the maximum off before exp, not after.")
def test_scores_of_any_size_neither_overflow_nor_vanish(chapter: Any, seed: int) -> None:
    check_add_page(chapter, random_pages(seed, [-900, 900, -900, 950]))


@pytest.mark.task("3.1", hint="A page of which a query sees nothing changes nothing for it. inf - inf is nan: where is one?")
def test_a_hidden_slot_counts_for_nothing_and_so_does_a_later_page_of_them(chapter: Any, seed: int) -> None:
    check_add_page(chapter, pages_with_hidden_slots(seed))


@pytest.mark.task("3.1", hint="Count dimensions from the end (-1, -2), so that any number of them can stand in front.")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 1)], ids=str)
def test_any_number_of_queries_is_taken_together(chapter: Any, seed: int, lead: tuple[int, ...]) -> None:
    check_add_page(chapter, random_pages(seed, [0, 2, 1], lead))


@pytest.mark.task("3.1", hint="Return new tensors. What ends in an underscore (mul_), += and [...] = change what was given.")
def test_what_was_given_stays_as_it_was(chapter: Any, seed: int) -> None:
    check_arguments_stay(chapter, random_pages(seed, [0, 4, -2]))


@pytest.fixture
def sound(chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The chapter with an ``add_page`` that works: if its own does not, tasks 3.2 and 3.3 are judged with another."""

    def add_page(partial: Any, scores: Tensor, values: Tensor) -> Any:
        maximum = torch.maximum(partial.maximum, scores.amax(-1))
        shrink, weights = (partial.maximum - maximum).exp(), (scores - maximum[..., None]).exp()
        added = (weights.transpose(-1, -2)[..., None] * values).sum(-3)
        return chapter.Partial(maximum, partial.total * shrink + weights.sum(-1), partial.acc * shrink[..., None] + added)

    try:
        for pages in (random_pages(seed, [0, 900, 0], lead) for lead in ((), (3,), (2, 3))):
            check_add_page(chapter, pages)
        check_add_page(chapter, pages_with_hidden_slots(seed))
        check_arguments_stay(chapter, random_pages(seed, [0, 4, -2]))
    except Exception:
        monkeypatch.setattr(chapter, "add_page", add_page)
    return chapter


class Scene:
    """Sequences of ``(query length, context length)`` whose tokens lie in blocks handed out in random order.

    ``tables`` are the block tables; ``spare`` is a block that nobody holds. Scores spread about as far as ``spread``.
    """

    def __init__(
        self, seed: int, lens: list[tuple[int, int]], block_size: int = 4, num_heads: int = 2, spread: float = 2
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lens, self.block_size = lens, block_size
        self.scale = 0.3  # not 1 / sqrt(head_dim), which a layer need not use
        num_pages = [-(-context_len // block_size) for _, context_len in lens]
        order = torch.randperm(sum(num_pages) + 1, generator=generator).tolist()
        self.spare = order.pop()
        self.tables = [[order.pop() for _ in range(count)] for count in num_pages]
        shape = (sum(num_pages) + 1, block_size, num_heads, 5)
        self.key_pool, self.value_pool = (torch.full(shape, POISON, dtype=torch.float64) for _ in range(2))
        for index, (_, context_len) in enumerate(lens):
            for position in range(context_len):
                place = divmod(self.slot(index, position), block_size)
                for pool in (self.key_pool, self.value_pool):
                    pool[place] = torch.randn(num_heads, 5, dtype=torch.float64, generator=generator)
        num_tokens = sum(query_len for query_len, _ in lens)
        self.query = torch.randn(num_tokens, num_heads, 5, dtype=torch.float64, generator=generator) * spread
        # Each row's sequence and position.
        self.lanes = [(index, position) for index, (count, length) in enumerate(lens) for position in range(length)[-count:]]

    def slot(self, index: int, position: int) -> int:
        return self.tables[index][position // self.block_size] * self.block_size + position % self.block_size

    def textbook(self, query: Tensor, index: int, num_seen: int, scale: float | None = None) -> Tensor:
        """What ``query`` ``[num_heads, head_dim]`` gets that sees the first ``num_seen`` slots of sequence ``index``."""
        slots = [self.slot(index, position) for position in range(num_seen)]
        keys, values = (pool.flatten(0, 1)[slots] for pool in (self.key_pool, self.value_pool))
        weights = ((keys * query).sum(-1) * (self.scale if scale is None else scale)).softmax(0)  # [num_seen, num_heads]
        return (weights[..., None] * values).sum(0)

    def explain(self, got: Tensor, query: Tensor, index: int, position: int) -> str:
        """Where a query stands, and what was computed for it instead if that can be told."""
        page, slot = position // self.block_size, self.slot(index, position)
        place = f"token {position} of sequence {index}, page {page}, block {slot // self.block_size}, slot {slot}; "
        place += f"it sees tokens 0 to {position}, block size {self.block_size}, block table {self.tables[index]}"
        if got.isnan().any():
            return f"{place}; nan comes of 0 / 0, of inf - inf and of inf * 0: which pages did this query take?"
        if torch.allclose(got, self.textbook(query, index, position + 1)):
            return f"{place}; the first digits are right: stay in the dtype of the query"
        for name, scale in (("1", 1.0), ("1 / sqrt(head_dim)", query.shape[-1] ** -0.5)):
            if torch.allclose(got, self.textbook(query, index, position + 1, scale=scale)):
                return f"{place}; this is right for a scale of {name}, the given one is {self.scale}"
        for other, table in enumerate(self.tables):
            for num_seen in range(1, len(table) * self.block_size + 1):
                if torch.allclose(got, self.textbook(query, other, num_seen)):
                    return f"{place}; this is right for a query that sees the first {num_seen} slots of sequence {other}"
        return place

    def check_batch(self, attention: Callable[..., Tensor], pools: tuple[Tensor, Tensor] | None = None) -> None:
        """All queries at once, with tables padded by a block that nobody holds."""
        starts = torch.tensor([0, *[query_len for query_len, _ in self.lens]]).cumsum(0)
        context_lens = torch.tensor([context_len for _, context_len in self.lens])
        width = max(map(len, self.tables)) + 2
        tables = torch.tensor([[*table, *[self.spare] * (width - len(table))] for table in self.tables])
        pools = pools or (self.key_pool.clone(), self.value_pool.clone())
        got = attention(self.query.clone(), *pools, tables, context_lens, starts, self.scale)
        expected = torch.stack([self.textbook(q, i, p + 1) for q, (i, p) in zip(self.query, self.lanes, strict=True)])
        assert_same(
            got,
            expected,
            what="the outputs of paged_attention",
            axes=("row", "head", "dim"),
            where=lambda place: self.explain(got[place[0]], self.query[place[0]], *self.lanes[place[0]]),
        )
        for name, pool, before in zip(("key_pool", "value_pool"), pools, (self.key_pool, self.value_pool), strict=True):
            assert_same(pool, before, what=f"the slots of {name} after the call", axes=("block", "offset", "head", "dim"))


def check_one(chapter: Any, scene: Scene, num_seen: int, block_table: Any) -> None:
    """One query of the scene's only sequence."""
    query, pools = scene.query[num_seen - 1], (scene.key_pool.clone(), scene.value_pool.clone())
    got = chapter.attend_one(query.clone(), *pools, block_table, num_seen, scene.scale)
    assert_same(
        got,
        scene.textbook(query, 0, num_seen),
        what=f"the outputs of attend_one with context_len {num_seen}",
        axes=("head", "dim"),
        where=lambda _: scene.explain(got, query, 0, num_seen - 1),
    )


@pytest.mark.task(
    "3.2", hint="One page, every slot filled: scores times scale, and keys and values of the block that the table names."
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_one_query_sees_a_single_full_page(sound: Any, seed: int, block_size: int) -> None:
    scene = Scene(seed, [(block_size,) * 2], block_size)
    check_one(sound, scene, block_size, scene.tables[0])


@pytest.mark.task("3.2", hint="Full pages: each is added to the same partial, in the block that the table names for it.")
@pytest.mark.parametrize("num_pages", [2, 5])
def test_one_query_sees_some_full_pages(sound: Any, seed: int, num_pages: int) -> None:
    scene = Scene(seed, [(4 * num_pages,) * 2])
    check_one(sound, scene, 4 * num_pages, scene.tables[0])


@pytest.mark.task(
    "3.2", hint="How many pages does this context have, and how many slots of the last one does the query see?"
)
@pytest.mark.parametrize(("block_size", "num_heads"), [(4, 2), (1, 1), (3, 1), (16, 3)])
def test_one_query_sees_its_context_and_no_more(sound: Any, seed: int, block_size: int, num_heads: int) -> None:
    scene = Scene(seed, [(4 * block_size,) * 2], block_size, num_heads)
    for num_seen in range(1, 4 * block_size + 1):
        check_one(sound, scene, num_seen, [*scene.tables[0], scene.spare])


@pytest.mark.task("3.2", hint="Look only at the entries of the pages that the context reaches, whatever else it holds.")
@pytest.mark.parametrize("kind", [list, tuple])
def test_entries_past_the_context_are_not_followed(sound: Any, seed: int, kind: Callable[[list[int]], Any]) -> None:
    scene = Scene(seed, [(12, 12)])
    for num_seen in range(1, 13):
        table = scene.tables[0][: -(-num_seen // 4)]
        check_one(sound, scene, num_seen, kind(table))  # nothing follows
        check_one(sound, scene, num_seen, kind([*table, *[10**6] * 3]))  # blocks that do not exist follow


@pytest.mark.task("3.2", hint="All pages go into one softmax, divided once, at the end. Hidden slots score minus infinity.")
@pytest.mark.parametrize("spread", [2, 1e5])
def test_one_query_over_many_pages(sound: Any, seed: int, spread: float) -> None:
    scene = Scene(seed, [(49, 49)], block_size=2, spread=spread)
    for num_seen in range(1, 50, 3):
        check_one(sound, scene, num_seen, scene.tables[0])


@pytest.mark.task(
    "3.3", hint="A single lane with full pages: scores times scale, and keys and values of the blocks that its table names."
)
@pytest.mark.parametrize("context_len", [4, 12])
def test_a_single_decode_with_full_pages(sound: Any, seed: int, context_len: int) -> None:
    Scene(seed, [(1, context_len)]).check_batch(sound.paged_attention)


@pytest.mark.task("3.3", hint="A single lane: which slots of its last page does it see? The pools are only read.")
@pytest.mark.parametrize("context_len", [1, 7])
def test_a_single_decode_whose_last_page_is_not_full(sound: Any, seed: int, context_len: int) -> None:
    Scene(seed, [(1, context_len)]).check_batch(sound.paged_attention)


@pytest.mark.task(
    "3.3",
    hint="Lanes of different lengths: whose pages does each read, which slots does it see, how many steps are there?",
)
@pytest.mark.parametrize("contexts", [[4, 12, 8], [3, 17, 5, 1], [9, 2]], ids=str)
def test_decodes_with_contexts_of_different_lengths(sound: Any, seed: int, contexts: list[int]) -> None:
    Scene(seed, [(1, context_len) for context_len in contexts]).check_batch(sound.paged_attention)


@pytest.mark.task("3.3", hint="The newest token sees the whole context, the one before it one token less, and so on.")
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 11])
def test_a_prompt_is_causal(sound: Any, seed: int, num_tokens: int) -> None:
    Scene(seed, [(num_tokens, num_tokens)]).check_batch(sound.paged_attention)


@pytest.mark.task(
    "3.3", hint="Rows of a chunk that stands behind cached tokens: work out from context_lens which position each row has."
)
@pytest.mark.parametrize("lens", [[(3, 7)], [(4, 8)], [(2, 13)], [(6, 9), (5, 17)]], ids=str)
def test_a_chunk_sees_what_was_cached_before_it(sound: Any, seed: int, lens: list[tuple[int, int]]) -> None:
    Scene(seed, lens).check_batch(sound.paged_attention)


@pytest.mark.task(
    "3.3", hint="Many rows, contexts and tables of different lengths: which sequence is a row of, and which position has it?"
)
@pytest.mark.parametrize(("block_size", "num_heads"), [(4, 2), (1, 1), (2, 3), (16, 2), (7, 1)])
def test_prompts_chunks_and_decodes_in_one_batch(sound: Any, seed: int, block_size: int, num_heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for turn in range(6):
        counts, cached = torch.randint(1, 9, (5,), generator=generator), torch.randint(0, 30, (5,), generator=generator)
        cached[turn % 5], counts[(turn + 1) % 5] = 0, 1  # a fresh prompt and a decode are always among them
        lens = list(zip(counts.tolist(), (counts + cached).tolist()))
        Scene(seed + turn, lens, block_size, num_heads).check_batch(sound.paged_attention)


@pytest.mark.task("3.3", hint="The longest context says how many pages there are. What is hidden scores minus infinity.")
@pytest.mark.parametrize("spread", [2, 1e5])
def test_a_context_of_many_pages_beside_short_ones(sound: Any, seed: int, spread: float) -> None:
    Scene(seed, [(1, 1), (3, 151), (3, 3), (2, 5)], block_size=2, spread=spread).check_batch(sound.paged_attention)


@pytest.mark.task("3.3", hint="Index the pools, or use reshape or flatten: view fails on memory that lies differently.")
def test_pools_may_be_laid_out_in_any_order(sound: Any, seed: int) -> None:
    scene = Scene(seed, [(1, 9), (5, 7), (3, 12)])
    keys, values = (pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (scene.key_pool, scene.value_pool))
    scene.check_batch(sound.paged_attention, (keys, values))  # as the engine stores them, [num_blocks, num_heads, ...]


class ShuffledBlocks(ch02_block_table.BlockManager):
    """Hands out free blocks in random order."""

    def allocate(self, count: int = 1) -> list[int]:
        taken = super().allocate(max(count, self.num_free_blocks))
        taken = [taken[index] for index in torch.randperm(len(taken)).tolist()]
        self.free(taken[count:])
        return taken[:count]


class PoisonedCache(ch02_block_table.PagedCache):
    """Slots hold a large value until they are written."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        poison(self)


@contextmanager
def attention_outputs(model: Any) -> Iterator[list[list[Tensor]]]:
    """``[layer][call]``: what each layer's attention gave, ``[num_tokens, num_heads, head_dim]``."""
    outputs: list[list[Tensor]] = [[] for _ in model.transformer.h]

    def keep(layer: int) -> Callable[..., None]:
        return lambda _, args: outputs[layer].append(args[0].reshape(-1, model.config.n_head, 16).clone())

    hooks = [block.attn.c_proj.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(model.transformer.h)]
    yield outputs
    for hook in hooks:
        hook.remove()


def check_step(trace: StepTrace, layer: int, got: Tensor, expected: dict[int, Tensor]) -> None:
    """One layer's attention in one step, against what it gives for each token of a sequence in one piece."""
    rows = [(row.seq_id, position) for row in trace.rows for position in range(row.start, row.context_len)]

    def where(index: tuple[int, ...]) -> str:
        seq_id, position = rows[index[0]]
        page, offset = divmod(position, trace.block_size)
        block_id = trace.block_tables[seq_id][page]
        return f"token {position} of sequence {seq_id}, block {block_id}, slot {block_id * trace.block_size + offset}"

    theirs = torch.stack([expected[seq_id][position] for seq_id, position in rows])
    what = f"in step {trace.step} and layer {layer}, the outputs of attention"
    assert_same(got, theirs, what=what, axes=("row", "head", "dim"), where=where)


@pytest.mark.task("3.3", hint="Step 0 computes prompts, later steps decode. The first layer that departs is told.")
@pytest.mark.parametrize(
    "shape", [{}, {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}], ids=["plain", "layer scale"]
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_every_layer_gives_what_hugging_face_gives(
    sound: Any, seed: int, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], block_size: int
) -> None:
    monkeypatch.setattr(ch02_block_table, "BlockManager", ShuffledBlocks)
    monkeypatch.setattr(ch02_block_table, "PagedCache", PoisonedCache)
    model, prompts = random_gpt2(seed=seed, **shape), [[1, 2, 3], [7] * 9, list(range(20)), [95]]
    logits: dict[int, list[Tensor]] = {index: [] for index in range(len(prompts))}
    traces: list[StepTrace] = []
    with attention_outputs(model) as got, torch.random.fork_rng():
        torch.manual_seed(seed)
        watch = {"on_step": traces.append, "on_logits": lambda index, scores: logits[index].append(scores.clone())}
        answers = sound.generate(model, prompts, 10, block_size=block_size, **watch)
    with attention_outputs(model) as whole:
        scores = [hf_logits(model, prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for step, trace in enumerate(traces):
        for layer, calls in enumerate(got):
            check_step(trace, layer, calls[step], dict(enumerate(whole[layer])))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = scores[index][len(prompt) - 1 : -1]
        assert_same(torch.stack(logits[index]), expected, what=f"the logits of prompt {index}", axes=("token", "score"))
        assert_same_tokens(answer, hf_greedy(model, prompt, 10, 96), what=f"the answer to prompt {index}")
    tables = [table for trace in traces for table in trace.block_tables.values()]
    assert any(list(table) != sorted(table) for table in tables), "all blocks were handed out in order"
