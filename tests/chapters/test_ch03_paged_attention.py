"""Chapter 03: the online softmax, one query over its pages, and a batch of queries over theirs.

The expected results are computed in the textbook way, over all tokens in one piece. All slots that a query must not see hold
a large value. A failure names the first place that is wrong and, where it can, what was computed there instead.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from chapters import ch02_block_table
from chapters.aids.new_tensors import NewTensors
from pagebrain.engine.trace import StepTrace
from tests.support.answers import assert_text
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hints import hint
from tests.support.models import POISON, hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "03"

ATOL = {torch.float64: 1e-9, torch.float32: 1e-4}

Page = tuple[Tensor, Tensor]
"""Scores ``[..., num_heads, block_size]`` and values ``[..., block_size, num_heads, head_dim]``."""


def random_pages(seed: int, shifts: list[Any], lead: tuple[int, ...] = (3,)) -> list[Page]:
    """One page for each of ``shifts``, a number, or one for each head, that is added to all scores of the page.

    So the shifts say which page has the maximum.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (*lead, 2, 4), (*lead, 4, 2, 5)
    pages = [tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes) for _ in shifts]
    return [(scores + shift, values) for (scores, values), shift in zip(pages, shifts, strict=True)]


def pages_with_hidden_slots(seed: int, shift: float = 0, poison: float = POISON) -> list[Page]:
    """Three pages for three queries; the values of hidden slots are ``poison``.

    Query 0 sees everything, query 1 a single slot of the first page, query 2 nothing of the second and third page.
    """
    pages = random_pages(seed, [shift] * 3)
    everything = [0, 1, 2, 3]
    for page, query, slots in ((0, 1, [1, 2, 3]), (2, 1, [2, 3]), (0, 2, [0, 3]), (1, 2, everything), (2, 2, everything)):
        scores, values = pages[page]
        scores[query, :, slots] = -math.inf
        values[query, slots] = poison
    return pages


def about_partial(name: str, got: Any, expected: Tensor, total: Tensor, first: bool) -> str:
    """A hint for a wrong ``name`` of a partial, as far as its numbers tell what went wrong."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return "maximum and total have one number for each query and head, acc has head_dim of them: see Partial."
    if got.isnan().any():
        if first:
            return "nan comes of inf - inf, of inf * 0 and of 0 / 0. Before the first page the maximum is minus infinity."
        return "nan comes of inf - inf, of inf * 0 and of 0 / 0. Which of your numbers is infinite after this page?"
    if torch.allclose(got.to(expected.dtype), expected, rtol=1e-5, atol=1e-5):
        return (
            "The first digits are right. Is a small number added, or a step computed in a smaller dtype than that of scores?"
        )
    if name == "maximum":
        return (
            "Each query and head has its own maximum, over all slots that it has seen so far. It may be negative and "
            "of any size. Hidden slots do not count."
        )
    if float(got.abs().max()) > 1000 * float(expected.abs().max()) + 1000:
        return "A hidden slot has weight here. Its score is minus infinity, so its term must be exactly 0."
    if name == "acc" and torch.allclose(got.to(expected.dtype), expected / total.unsqueeze(-1)):
        return "acc is not divided here: the caller divides it by total once, after the last page."
    if first:
        return "The first page has nothing before it: total and acc are the sums over its own terms, exp(score - maximum)."
    return "total and acc are relative to the maximum. If it grows, both shrink by the same factor, for each query and head."


def check_add_page(
    chapter: Any, pages: list[Page], names: tuple[str, ...] = ("maximum", "total", "acc"), dtype: torch.dtype = torch.float64
) -> None:
    """After each page, the three numbers, or those of ``names``, must be those of all pages so far taken together."""
    lead = pages[0][0].shape[:-2]
    axes = [*("batch", "query")[2 - len(lead) :], "head", "dim"]
    partial = chapter.Partial.start(torch.zeros(*lead, 2, 5, dtype=dtype))
    pages = [(scores.to(dtype), values.to(dtype)) for scores, values in pages]
    for number, (page_scores, page_values) in enumerate(pages):
        partial = chapter.add_page(partial, page_scores.clone(), page_values.clone())
        assert isinstance(partial, chapter.Partial), f"add_page must return a Partial, got {type(partial).__name__}"
        scores = torch.cat([scores for scores, _ in pages[: number + 1]], dim=-1).double()
        values = torch.cat([values for _, values in pages[: number + 1]], dim=-3).double()
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        acc, total = (weights.transpose(-1, -2).unsqueeze(-1) * values).sum(-3), weights.sum(-1)
        for name, expected in zip(partial._fields, (scores.amax(-1), total, acc), strict=True):
            if name in names:
                got, what = getattr(partial, name), f"the values of `{name}` after page {number}"
                with hint(about_partial(name, got, expected, total, number == 0)):
                    assert_same(got, expected, what=what, axes=axes[: expected.ndim], atol=ATOL[dtype])
                with hint("Compute in the dtype that was given: make no tensor of another one."):
                    assert got.dtype == dtype, f"`{name}` is {got.dtype} after page {number}, scores and values are {dtype}"


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
    "3.1", hint="A term is exp(score - maximum). total is the sum of the terms, acc that of terms times values."
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


@pytest.mark.task(
    "3.1", hint="Each query and head has a factor of its own. Here one head's maximum grows, the other's stays."
)
def test_the_maximum_of_one_head_grows_and_that_of_the_other_stays(chapter: Any, seed: int) -> None:
    up_and_down = torch.tensor([[9.0], [-9.0]], dtype=torch.float64)
    check_add_page(chapter, random_pages(seed, [0, up_and_down, -2 * up_and_down]))


@pytest.mark.task("3.1", hint="Every exponent must be at most 0: subtract the maximum before exp, not after.")
@pytest.mark.parametrize("size", [900, 100_000])
def test_scores_of_any_size_neither_overflow_nor_vanish(chapter: Any, seed: int, size: float) -> None:
    check_add_page(chapter, random_pages(seed, [-size, size, -size, 1.05 * size]))
    check_add_page(chapter, pages_with_hidden_slots(seed, shift=-size))


@pytest.mark.task("3.1", hint="Compute in the dtype that was given. In float32 exp(89) is inf: subtract the maximum first.")
def test_float32_stays_float32(chapter: Any, seed: int) -> None:
    check_add_page(chapter, random_pages(seed, [0, 4, -4]), dtype=torch.float32)
    check_add_page(chapter, random_pages(seed, [-200, 200, 0]), names=("maximum", "acc"), dtype=torch.float32)


@pytest.mark.task(
    "3.1", hint="A hidden slot, with the score minus infinity, has the term 0, and so no part in any of the three."
)
@pytest.mark.parametrize("poison", [POISON, 1e200])
def test_a_hidden_slot_counts_for_nothing_and_so_does_a_later_page_of_them(chapter: Any, seed: int, poison: float) -> None:
    pages = pages_with_hidden_slots(seed, poison=poison)
    check_add_page(chapter, pages)
    check_add_page(chapter, [(scores.flip(0), values.flip(0)) for scores, values in pages])  # the queries in reverse


@pytest.mark.task("3.1", hint="Count dimensions from the end (-1, -2), so that any number of them can stand in front.")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 1)], ids=str)
def test_any_number_of_queries_is_taken_together(chapter: Any, seed: int, lead: tuple[int, ...]) -> None:
    check_add_page(chapter, random_pages(seed, [0, 2, 1], lead))


@pytest.mark.task("3.1", hint="Return new tensors. What ends in an underscore (mul_), += and [...] = change what was given.")
def test_what_was_given_stays_as_it_was(chapter: Any, seed: int) -> None:
    check_arguments_stay(chapter, random_pages(seed, [0, 4, -2]))


class Scene:
    """Sequences of ``(query length, context length)`` whose tokens lie in blocks handed out in random order.

    ``tables`` are the block tables; ``spare`` is a block that no sequence holds. Scores spread about as far as ``spread``.
    """

    def __init__(
        self,
        seed: int,
        lens: list[tuple[int, int]],
        block_size: int = 4,
        num_heads: int = 2,
        spread: float = 2,
        head_dim: int = 5,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lens, self.block_size, self.dtype = lens, block_size, dtype
        self.scale = 0.3  # not 1 / sqrt(head_dim), which a layer need not use
        num_pages = [-(-context_len // block_size) for _, context_len in lens]
        order = torch.randperm(sum(num_pages) + 1, generator=generator).tolist()
        self.spare = order.pop()
        self.tables = [[order.pop() for _ in range(count)] for count in num_pages]
        shape = (sum(num_pages) + 1, block_size, num_heads, head_dim)
        self.key_pool, self.value_pool = (torch.full(shape, POISON, dtype=dtype) for _ in range(2))
        for index, (_, context_len) in enumerate(lens):
            for position in range(context_len):
                place = divmod(self.slot(index, position), block_size)
                for pool in (self.key_pool, self.value_pool):
                    pool[place] = torch.randn(num_heads, head_dim, dtype=dtype, generator=generator)
        num_tokens = sum(query_len for query_len, _ in lens)
        self.query = torch.randn(num_tokens, num_heads, head_dim, dtype=dtype, generator=generator) * spread
        # Each row's sequence and position.
        self.lanes = [
            (index, position) for index, (count, length) in enumerate(lens) for position in range(length - count, length)
        ]

    def with_very_low_scores(self) -> "Scene":
        """The same scene, with all scores below -100,000."""
        self.key_pool.abs_().add_(1)
        self.query = -1e5 * (self.query.abs() + 1)
        return self

    def slot(self, index: int, position: int) -> int:
        return self.tables[index][position // self.block_size] * self.block_size + position % self.block_size

    def textbook(self, query: Tensor, index: int, num_seen: int, scale: float | None = None) -> Tensor:
        """What ``query`` ``[num_heads, head_dim]`` gets that sees the first ``num_seen`` slots of sequence ``index``."""
        slots = [self.slot(index, position) for position in range(num_seen)]
        keys, values = (pool.flatten(0, 1)[slots].double() for pool in (self.key_pool, self.value_pool))
        weights = ((keys * query.double()).sum(-1) * (self.scale if scale is None else scale)).softmax(
            0
        )  # [num_seen, heads]
        return (weights[..., None] * values).sum(0)

    def divided_at_each_page(self, query: Tensor, index: int, num_seen: int) -> Tensor:
        """What ``query`` gets if ``acc`` is divided by ``total`` after each page: a usual mistake."""
        acc, total, maximum = torch.zeros_like(query.double()), torch.zeros(()), torch.full((query.shape[0],), -math.inf)
        for first in range(0, num_seen, self.block_size):
            slots = [self.slot(index, position) for position in range(first, min(num_seen, first + self.block_size))]
            keys, values = (pool.flatten(0, 1)[slots].double() for pool in (self.key_pool, self.value_pool))
            scores = (keys * query.double()).sum(-1) * self.scale  # [slots, num_heads]
            before, maximum = maximum, torch.maximum(maximum.double(), scores.amax(0))
            shrink, weights = (before - maximum).exp(), (scores - maximum).exp()
            total = total * shrink + weights.sum(0)
            acc = (acc * shrink[:, None] + (weights[..., None] * values).sum(0)) / total[:, None]
        return acc

    def explain(self, got: Tensor, query: Tensor, index: int, position: int) -> str:
        """Where a query stands, and what was computed for it instead if that can be told."""
        page, slot = position // self.block_size, self.slot(index, position)
        place = f"token {position} of sequence {index}, page {page}, block {slot // self.block_size}, slot {slot}; "
        place += f"it sees tokens 0 to {position}, block size {self.block_size}, block table {self.tables[index]}"
        found = self.recognise(got.double(), query, index, position + 1)
        return f"{place}; {found}" if found else place

    def recognise(self, got: Tensor, query: Tensor, index: int, num_seen: int) -> str:
        """The mistake that gives ``got`` to a query that sees the first ``num_seen`` slots; empty if it is not known."""
        if got.isnan().any():
            hidden = num_seen % self.block_size
            scores = self.textbook_scores(query, index, num_seen)
            if float(scores.max()) > math.log(torch.finfo(self.dtype).max):
                return "nan: some scores here are so large that exp(score) is inf; subtract the maximum before exp"
            if hidden:
                return (
                    "nan: the hidden slots of the last page would score high; is the maximum taken before they are masked?"
                )
            return (
                "nan comes of 0 / 0, of inf - inf and of inf * 0: does this query see any slot of the pages that it takes?"
            )
        if torch.allclose(got, self.textbook(query, index, num_seen), rtol=1e-4, atol=1e-5):
            return "the first digits are right: stay in the dtype of the query"
        for name, scale in (("1", 1.0), ("1 / sqrt(head_dim)", query.shape[-1] ** -0.5), ("scale * scale", self.scale**2)):
            if torch.allclose(got, self.textbook(query, index, num_seen, scale=scale)):
                return f"this is right for a scale of {name}, the given one is {self.scale}"
        if torch.allclose(got, self.divided_at_each_page(query, index, num_seen)):
            return "this is what comes out if acc is divided by total after each page, not once after the last one"
        if table_ignored := self.in_block_order(query, index, num_seen, got):
            return table_ignored
        for other, table in enumerate(self.tables):
            for seen in range(1, len(table) * self.block_size + 1):
                if torch.allclose(got, self.textbook(query, other, seen)):
                    return f"this is right for a query that sees the first {seen} slots of sequence {other}"
        return ""

    def in_block_order(self, query: Tensor, index: int, num_seen: int, got: Tensor) -> str:
        """Whether ``got`` comes of the blocks 0, 1, 2 and so on, in place of those in the table."""
        tables, self.tables = self.tables, [[*range(len(table))] for table in self.tables]
        found = torch.allclose(got, self.textbook(query, index, num_seen))
        self.tables = tables
        return "this is right for the blocks 0, 1, 2 and so on: follow the block table" * found

    def textbook_scores(self, query: Tensor, index: int, num_seen: int) -> Tensor:
        """The scores ``[num_seen, num_heads]`` of a query."""
        slots = [self.slot(index, position) for position in range(num_seen)]
        return (self.key_pool.flatten(0, 1)[slots].double() * query.double()).sum(-1) * self.scale

    def arguments(self, spare_columns: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """``block_tables``, with so many columns that no sequence needs, ``context_lens`` and ``query_starts``."""
        starts = torch.tensor([0, *[query_len for query_len, _ in self.lens]]).cumsum(0)
        context_lens = torch.tensor([context_len for _, context_len in self.lens])
        width = max(map(len, self.tables)) + spare_columns
        tables = torch.tensor([[*table, *[self.spare] * (width - len(table))] for table in self.tables])
        return tables, context_lens, starts

    def expected(self) -> Tensor:
        """The outputs of all lanes, ``[num_tokens, num_heads, head_dim]``."""
        lanes = zip(self.query, self.lanes, strict=True)
        return torch.stack([self.textbook(query, index, position + 1) for query, (index, position) in lanes])

    def check_outputs(self, got: Tensor, what: str = "the outputs of paged_attention") -> None:
        """The outputs of all lanes, and their dtype."""
        assert_same(
            got,
            self.expected(),
            what=what,
            axes=("row", "head", "dim"),
            atol=ATOL[self.dtype],
            where=lambda place: self.explain(got[place[0]], self.query[place[0]], *self.lanes[place[0]]),
        )
        with hint("Compute in the dtype of the query: make no tensor of another one."):
            assert got.dtype == self.dtype, f"{what} are {got.dtype}, query and pools are {self.dtype}"

    def check_batch(
        self, attention: Callable[..., Tensor], pools: tuple[Tensor, Tensor] | None = None, spare_columns: int = 2
    ) -> None:
        """All queries at once, with tables padded by a block that no sequence holds."""
        pools = pools or (self.key_pool.clone(), self.value_pool.clone())

        def again() -> tuple[Any, ...]:
            return self.query.clone(), self.key_pool.clone(), self.value_pool.clone(), *self.arguments(), self.scale

        with earlier_calls_and_pages(attention, again, self.expected()):
            self.check_outputs(attention(self.query.clone(), *pools, *self.arguments(spare_columns), self.scale))
        for name, pool, before in zip(("key_pool", "value_pool"), pools, (self.key_pool, self.value_pool), strict=True):
            with hint("The pools are only read: what is hidden is hidden in the scores."):
                assert_same(
                    pool, before, what=f"the slots of {name} after the call", axes=("block", "offset", "head", "dim")
                )


def right_if_loaded_anew(function: Callable[..., Tensor], arguments: tuple[Any, ...], expected: Tensor) -> bool:
    """Whether the same call is right in a fresh copy of the learner's file: then something was kept from earlier calls."""
    file = sys.modules[function.__module__].__file__ if function.__module__ in sys.modules else None
    spec = importlib.util.spec_from_file_location("loaded_anew", file) if file else None
    if spec is None or spec.loader is None:
        return False
    fresh = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(fresh)
        got = getattr(fresh, function.__name__)(*arguments)
        return got.shape == expected.shape and torch.allclose(got.double(), expected)
    except Exception:
        return False


@contextmanager
def earlier_calls_and_pages(
    function: Callable[..., Tensor], arguments: Callable[[], tuple[Any, ...]], expected: Tensor
) -> Iterator[None]:
    """Two mistakes are told by how a call fails: what was kept between calls, and a page too many."""
    try:
        yield
    except IndexError:
        with hint(
            "A page past the last one is read. A context of n tokens has n / block_size pages, rounded up, and this table "
            "has no entry to spare."
        ):
            raise
    except (AssertionError, RuntimeError):
        if not right_if_loaded_anew(function, arguments(), expected):
            raise
        with hint(
            "As the first call after an import, this call is right. So something is kept from an earlier call: a plan, a "
            "mask, or keys and values. Keep nothing: lengths, tables and pools change."
        ):
            raise


def check_one(chapter: Any, scene: Scene, num_seen: int, block_table: Any) -> None:
    """One query of the scene's only sequence."""
    query, expected = scene.query[num_seen - 1], scene.textbook(scene.query[num_seen - 1], 0, num_seen)
    what = f"the outputs of attend_one with context_len {num_seen}"

    def arguments() -> tuple[Any, ...]:
        return query.clone(), scene.key_pool.clone(), scene.value_pool.clone(), block_table, num_seen, scene.scale

    with earlier_calls_and_pages(chapter.attend_one, arguments, expected):
        got = chapter.attend_one(*arguments())
        assert_same(
            got,
            expected,
            what=what,
            axes=("head", "dim"),
            atol=ATOL[scene.dtype],
            where=lambda _: scene.explain(got, query, 0, num_seen - 1),
        )
    with hint("Compute in the dtype of the query: make no tensor of another one."):
        assert got.dtype == scene.dtype, f"{what} are {got.dtype}, query and pools are {scene.dtype}"


def check_room(made: NewTensors, lanes: int, scene: Scene, name: str) -> None:
    """No keys and values of many pages are held at once. Scores may be held, and a page is looked at a few times."""
    context = max(length for _, length in scene.lens)
    num_heads, head_dim = scene.query.shape[1:]
    page, scores = lanes * scene.block_size * num_heads * head_dim, lanes * num_heads * context
    allowed = 6 * page + 6 * scores
    everything = context * num_heads * head_dim
    assert allowed < everything, "the scene does not tell pages from whole contexts"
    with hint(
        "Read the keys and values of a page, use them, and go on to the next page: hold no page longer than its step."
    ):
        assert made.most_at_once <= allowed, (
            f"{name} holds {made.most_at_once:,} new numbers at once. A page of keys{' for each lane' * (lanes > 1)} has "
            f"{page:,} and all scores together are {scores:,}, but the keys of a whole context are {everything:,}: "
            "it seems that keys or values of many pages are copied together"
        )


@pytest.mark.task(
    "3.2", hint="One page, every slot filled: scores times scale, and keys and values of the block that the table names."
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_one_query_sees_a_single_full_page(chapter: Any, seed: int, block_size: int) -> None:
    scene = Scene(seed, [(block_size,) * 2], block_size)
    check_one(chapter, scene, block_size, scene.tables[0])


@pytest.mark.task("3.2", hint="Full pages: each is added to the same partial, in the block that the table names for it.")
@pytest.mark.parametrize("num_pages", [2, 5])
def test_one_query_sees_some_full_pages(chapter: Any, seed: int, num_pages: int) -> None:
    scene = Scene(seed, [(4 * num_pages,) * 2])
    check_one(chapter, scene, 4 * num_pages, scene.tables[0])


@pytest.mark.task(
    "3.2", hint="How many pages does this context have, and how many slots of the last one does the query see?"
)
@pytest.mark.parametrize(("block_size", "num_heads"), [(4, 2), (1, 1), (16, 3)])
def test_one_query_sees_its_context_and_no_more(chapter: Any, seed: int, block_size: int, num_heads: int) -> None:
    scene = Scene(seed, [(4 * block_size,) * 2], block_size, num_heads)
    for num_seen in range(1, 4 * block_size + 1, 1 if block_size < 12 else 5):
        check_one(chapter, scene, num_seen, [*scene.tables[0], scene.spare])


@pytest.mark.task("3.2", hint="Block sizes that are no powers of two: use // and %, not shifts and masks of bits.")
@pytest.mark.parametrize("block_size", [5, 12, 24])
def test_one_query_reads_blocks_of_any_size(chapter: Any, seed: int, block_size: int) -> None:
    scene = Scene(seed, [(50, 50)], block_size)
    for num_seen in (1, 5, 12, 24, 25, 49, 50):
        check_one(chapter, scene, num_seen, scene.tables[0])


@pytest.mark.task(
    "3.2", hint="Read only the entries of the pages that the context reaches. Other entries may name no block at all."
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_entries_past_the_context_are_not_followed(chapter: Any, seed: int, kind: Callable[[list[int]], Any]) -> None:
    scene = Scene(seed, [(12, 12)])
    for num_seen in range(1, 13):
        table = scene.tables[0][: -(-num_seen // 4)]
        check_one(chapter, scene, num_seen, kind(table))  # nothing follows
        check_one(chapter, scene, num_seen, kind([*table, *[10**6] * 3]))  # blocks that do not exist follow


@pytest.mark.task("3.2", hint="Hidden slots score minus infinity: any finite number may lie above the visible scores.")
def test_hidden_slots_lose_against_any_visible_score(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [(6, 6)]).with_very_low_scores()
    for num_seen in (1, 3, 5, 6):
        check_one(chapter, scene, num_seen, scene.tables[0])


@pytest.mark.task("3.2", hint="Compute in the dtype of the query. In float32 exp(89) is inf: the maximum comes off first.")
@pytest.mark.parametrize("spread", [2, 200])
def test_one_query_in_float32(chapter: Any, seed: int, spread: float) -> None:
    scene = Scene(seed, [(22, 22)], spread=spread, dtype=torch.float32)
    for num_seen in (1, 4, 9, 22):
        check_one(chapter, scene, num_seen, scene.tables[0])


@pytest.mark.task("3.2", hint="Keep nothing between calls: the same blocks hold other keys and values after a step.")
def test_blocks_are_read_anew_in_each_call(chapter: Any, seed: int) -> None:
    first, second = Scene(seed, [(10, 10)]), Scene(seed + 1, [(10, 10)])
    query, pools, table = first.query[9], (first.key_pool.clone(), first.value_pool.clone()), list(first.tables[0])
    got_first = chapter.attend_one(query, *pools, table, 10, first.scale).clone()
    query.copy_(second.query[9])
    pools[0].copy_(second.key_pool)
    pools[1].copy_(second.value_pool)
    table[:] = second.tables[0]
    got = chapter.attend_one(query, *pools, table, 10, second.scale)
    assert not torch.allclose(got, got_first), (
        "a second call, after all that was given has changed, gives the first one's result"
    )
    expected, what = (
        second.textbook(second.query[9], 0, 10),
        "the outputs of a second call, after all that was given has changed,",
    )
    assert_same(got, expected, what=what, axes=("head", "dim"), where=lambda _: second.explain(got, second.query[9], 0, 9))


@pytest.mark.task("3.2", hint="A page at a time: key_pool[block_id] is a view, and no key or value is copied.")
def test_one_query_holds_no_more_than_a_page(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [(127, 127)], head_dim=64)
    unused = torch.full((3000, 4, 2, 64), POISON, dtype=torch.float64)
    pools = torch.cat([scene.key_pool, unused]), torch.cat([scene.value_pool, unused])
    with NewTensors() as made:
        got = chapter.attend_one(scene.query[126], *pools, scene.tables[0], 127, scene.scale)
    check_room(made, 1, scene, "attend_one")
    expected, what = scene.textbook(scene.query[126], 0, 127), "the outputs of attend_one with context_len 127"
    assert_same(got, expected, what=what, axes=("head", "dim"), where=lambda _: scene.explain(got, scene.query[126], 0, 126))


@pytest.mark.task("3.2", hint="All pages go into one softmax, divided once, at the end. Hidden slots score minus infinity.")
@pytest.mark.parametrize("spread", [2, 1e5])
def test_one_query_over_many_pages(chapter: Any, seed: int, spread: float) -> None:
    scene = Scene(seed, [(49, 49)], block_size=2, spread=spread)
    for num_seen in range(1, 50, 3):
        check_one(chapter, scene, num_seen, scene.tables[0])


@pytest.mark.task(
    "3.3", hint="A single lane with full pages: scores times scale, and keys and values of the blocks that its table names."
)
@pytest.mark.parametrize("context_len", [4, 12])
def test_a_single_decode_with_full_pages(chapter: Any, seed: int, context_len: int) -> None:
    scene = Scene(seed, [(1, context_len)])
    scene.check_batch(chapter.paged_attention)
    scene.check_batch(chapter.paged_attention, spare_columns=0)


@pytest.mark.task("3.3", hint="A single lane: which slots of its last page does it see?")
@pytest.mark.parametrize("context_len", [1, 7])
def test_a_single_decode_whose_last_page_is_not_full(chapter: Any, seed: int, context_len: int) -> None:
    Scene(seed, [(1, context_len)]).check_batch(chapter.paged_attention)


@pytest.mark.task(
    "3.3",
    hint="Lanes of different lengths: which pages does each read, which slots does it see, how many steps are there?",
)
@pytest.mark.parametrize("contexts", [[4, 12, 8], [3, 17, 5, 1], [9, 2]], ids=str)
def test_decodes_with_contexts_of_different_lengths(chapter: Any, seed: int, contexts: list[int]) -> None:
    Scene(seed, [(1, context_len) for context_len in contexts]).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="The newest token sees the whole context, the one before it one token less, and so on.")
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 11])
def test_a_prompt_is_causal(chapter: Any, seed: int, num_tokens: int) -> None:
    Scene(seed, [(num_tokens, num_tokens)]).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="A chunk follows tokens that are cached: its rows have the last positions of the context.")
@pytest.mark.parametrize("lens", [[(3, 7)], [(4, 8)], [(2, 13)], [(6, 9), (5, 17)]], ids=str)
def test_a_chunk_sees_what_was_cached_before_it(chapter: Any, seed: int, lens: list[tuple[int, int]]) -> None:
    Scene(seed, lens).check_batch(chapter.paged_attention)


@pytest.mark.task(
    "3.3",
    hint="Rows, contexts and tables of different lengths: which sequence does a row belong to, and what is its position?",
)
@pytest.mark.parametrize(("block_size", "num_heads"), [(4, 2), (1, 1), (2, 3), (16, 2)])
def test_prompts_chunks_and_decodes_in_one_batch(chapter: Any, seed: int, block_size: int, num_heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for turn in range(6):
        counts, cached = torch.randint(1, 9, (5,), generator=generator), torch.randint(0, 30, (5,), generator=generator)
        cached[turn % 5], counts[(turn + 1) % 5] = 0, 1  # a fresh prompt and a decode are always among them
        lens = list(zip(counts.tolist(), (counts + cached).tolist()))
        Scene(seed + turn, lens, block_size, num_heads).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="Block sizes that are no powers of two: use // and %, not shifts and masks of bits.")
@pytest.mark.parametrize("block_size", [5, 12, 24])
def test_a_batch_with_blocks_of_any_size(chapter: Any, seed: int, block_size: int) -> None:
    Scene(seed, [(7, 31), (1, 48), (24, 24), (1, 5)], block_size).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="A sequence without rows has no lane: query_starts has the same number twice.")
@pytest.mark.parametrize("lens", [[(0, 5), (1, 9)], [(2, 6), (0, 0), (0, 21), (3, 3)], [(1, 4), (0, 9)]], ids=str)
def test_a_sequence_may_have_no_rows(chapter: Any, seed: int, lens: list[tuple[int, int]]) -> None:
    Scene(seed, lens).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="Take the number of pages from the sequences that have rows: the others may say anything.")
def test_a_sequence_without_rows_may_have_any_context_length(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [(2, 6), (0, 0), (1, 9)])
    block_tables, context_lens, query_starts = scene.arguments(0)
    for context_len in (1_000_000, 40):
        context_lens[1] = context_len
        out = chapter.paged_attention(
            scene.query.clone(), scene.key_pool, scene.value_pool, block_tables, context_lens, query_starts, scene.scale
        )
        scene.check_outputs(out)


@pytest.mark.task("3.3", hint="Hidden slots score minus infinity: any finite number may lie above the visible scores.")
def test_hidden_slots_of_a_batch_lose_against_any_visible_score(chapter: Any, seed: int) -> None:
    Scene(seed, [(1, 6), (3, 9)]).with_very_low_scores().check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="Compute in the dtype of the query. In float32 exp(89) is inf: the maximum comes off first.")
@pytest.mark.parametrize("spread", [2, 200])
def test_a_batch_in_float32(chapter: Any, seed: int, spread: float) -> None:
    Scene(seed, [(3, 9), (1, 17), (4, 4)], spread=spread, dtype=torch.float32).check_batch(chapter.paged_attention)


@pytest.mark.task(
    "3.3", hint="Keep nothing between calls, no mask and no plan: in the next step the tensors hold other numbers."
)
def test_lengths_tables_and_pools_are_read_anew_in_each_call(chapter: Any, seed: int) -> None:
    first, second = Scene(seed, [(1, 6), (3, 9)]), Scene(seed + 1, [(2, 8), (2, 11)])
    given = [first.query.clone(), first.key_pool.clone(), first.value_pool.clone(), *first.arguments()]
    chapter.paged_attention(*given, first.scale)
    for tensor, new in zip(given, [second.query, second.key_pool, second.value_pool, *second.arguments()], strict=True):
        tensor.copy_(new)
    second.check_outputs(
        chapter.paged_attention(*given, second.scale), "in a second call with other numbers in the same tensors, the outputs"
    )


@pytest.mark.task("3.3", hint="In a step, each lane reads one page; the step's copies are gone before the next step.")
def test_lanes_hold_no_more_than_a_page_each(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [(1, 192), (1, 150), (1, 17)], head_dim=64)
    unused = torch.full((2000, 4, 2, 64), POISON, dtype=torch.float64)
    pools = torch.cat([scene.key_pool, unused]), torch.cat([scene.value_pool, unused])
    with NewTensors() as made:
        got = chapter.paged_attention(scene.query, *pools, *scene.arguments(), scene.scale)
    check_room(made, 3, scene, "paged_attention")
    scene.check_outputs(got)


@pytest.mark.task(
    "3.3", hint="Rows of one sequence read the same pages: take all of them together, without a loop over rows."
)
def test_more_rows_need_no_more_operations(chapter: Any, seed: int) -> None:
    counts = {}
    for num_rows in (6, 48):
        scene = Scene(seed, [(num_rows, 60)], block_size=16)
        with NewTensors() as made:
            chapter.paged_attention(scene.query, scene.key_pool, scene.value_pool, *scene.arguments(), scene.scale)
        counts[num_rows] = made.num_operations
    assert counts[48] <= 2 * counts[6], (
        f"over the same 4 pages, 6 rows take {counts[6]} operations and 48 rows {counts[48]}: "
        "the number must not grow with the rows"
    )


@pytest.mark.task("3.3", hint="The longest context says how many pages there are. What is hidden scores minus infinity.")
@pytest.mark.parametrize("spread", [2, 1e5])
def test_a_context_of_many_pages_beside_short_ones(chapter: Any, seed: int, spread: float) -> None:
    Scene(seed, [(1, 1), (3, 151), (3, 3), (2, 5)], block_size=2, spread=spread).check_batch(chapter.paged_attention)


@pytest.mark.task("3.3", hint="Index the pools, or use reshape or flatten: view fails on memory that lies differently.")
def test_pools_may_be_laid_out_in_any_order(chapter: Any, seed: int) -> None:
    scene = Scene(seed, [(1, 9), (5, 7), (3, 12)])
    keys, values = (pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (scene.key_pool, scene.value_pool))
    scene.check_batch(chapter.paged_attention, (keys, values))  # as the engine stores them, [num_blocks, num_heads, ...]


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
        noise = torch.allclose(got[index[0]], theirs[index[0]], rtol=1e-4, atol=1e-5)
        more = "; the first digits are right: stay in the dtype of the query" * noise
        return f"token {position} of sequence {seq_id}, block {block_id}, slot {block_id * trace.block_size + offset}{more}"

    theirs = torch.stack([expected[seq_id][position] for seq_id, position in rows])
    what = f"in step {trace.step} and layer {layer}, the outputs of attention"
    assert_same(got, theirs, what=what, axes=("row", "head", "dim"), where=where)


@pytest.mark.task(
    "3.3", hint="The first step and layer that differ are named. Step 0 computes the prompts, later steps decode."
)
@pytest.mark.parametrize(
    "shape", [{}, {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}], ids=["plain", "layer scale"]
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_every_layer_gives_what_hugging_face_gives(
    chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], block_size: int
) -> None:
    monkeypatch.setattr(ch02_block_table, "BlockManager", ShuffledBlocks)
    monkeypatch.setattr(ch02_block_table, "PagedCache", PoisonedCache)
    model, prompts = random_gpt2(seed=seed, **shape), [[1, 2, 3], [7] * 9, list(range(20)), [95]]
    logits: dict[int, list[Tensor]] = {index: [] for index in range(len(prompts))}
    traces: list[StepTrace] = []
    with attention_outputs(model) as got, torch.random.fork_rng():
        torch.manual_seed(seed)
        watch = {"on_step": traces.append, "on_logits": lambda index, scores: logits[index].append(scores.clone())}
        answers = chapter.generate(model, prompts, 10, block_size=block_size, **watch)
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


def operations_for_a_page(chapter: Any, seed: int) -> float:
    """What one more page costs in a decode step of one sequence: operations of ``paged_attention``."""
    counts, fewest = [], 4 + seed % 7
    for num_pages in (fewest, fewest + 20):
        query, pool = torch.ones(1, 2, 8), torch.ones(60, 16, 2, 8)
        tables, lens, starts = torch.arange(60)[None], torch.tensor([16 * num_pages]), torch.tensor([0, 1])
        with NewTensors() as made:
            chapter.paged_attention(query, pool, pool, tables, lens, starts, 0.5)
        counts.append(made.num_operations)
    return (counts[1] - counts[0]) / 20


@pytest.mark.task("3.4", hint="Measure your own paged_attention with NewTensors, and return (number, text).")
def test_the_operations_for_a_page_were_counted(
    chapter: Any, seed: int, record_property: Callable[[str, object], None]
) -> None:
    answer = chapter.answer_3_4()
    with hint("Return two things: a number, and a text for the instructor."):
        assert isinstance(answer, tuple) and len(answer) == 2, f"answer_3_4 must return (number, text), got {answer!r:.80}"
    number, text = answer
    with hint("The number is the first of the two, an int or a float."):
        assert isinstance(number, (int, float)), f"the number of answer_3_4 is a {type(number).__name__}"
    with hint("Say in one to four sentences why chapter 03 is slower here, and what a kernel would change."):
        assert_text("answer_3_4", text)
    expected = operations_for_a_page(chapter, seed)
    if number > expected:
        way = "Too many. Count one layer and only what one more page adds: the difference of two contexts, for each page."
    else:
        way = "Too few. Count all operations of one more page, views included, and do not divide by tokens or heads."
    with hint(way):
        assert abs(number - expected) <= 1, (
            f"answer_3_4 says {number:g} operations for one more page, layer and decode, "
            f"but your paged_attention starts {'fewer' if number > expected else 'more'}"
        )
    record_property("answer", text)
