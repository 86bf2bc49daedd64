"""Chapter 07: batch rows, buckets, the captured step, the loop with a step in flight, blocks that come late; then all of it.

What a GPU would do is done here on the CPU: a captured step is a recording, and replaying it reads and writes the memory
that it was recorded over. So a buffer that was bound anew, a value read too early and a padding row that writes into
another sequence's block are found without a GPU.
"""

import json
import random
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chapters import ch02_block_table, ch04_scheduler
from chapters.aids.capture import CaptureError, NoWaiting, Recording, capture
from chapters.course.catalog import ROOT
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence, SequenceGroup, SequenceStatus
from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hashing import next_token
from tests.support.hints import hint
from tests.support.models import POISON, hf_cache, hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "07"
CPU = torch.device("cpu")
END = 96
"""The end-of-sequence token of the small models."""


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def make_sequence(number: int, num_tokens: int, max_new_tokens: int = 20, first: int = 0) -> Sequence:
    """A sequence of which no two tokens are the same, and none is another sequence's."""
    prompt = tuple(1000 * number + first + place for place in range(num_tokens))
    request = Request(str(number), None, prompt, SamplingParams(temperature=0), number, number, 0.0)
    return Sequence(number, request, 0, num_tokens + max_new_tokens)


WAITING_HINT = (
    "On a GPU, tolist, item, int(), bool() and `if` of a tensor make the host wait until all that was launched "
    "is done. The host "
    "knows what it needs without looking: the group, row_of, num_sent and the block tables."
)


@contextmanager
def without_waiting(what: str) -> Iterator[None]:
    """``what`` may not read a tensor's values in the block."""
    try:
        with NoWaiting():
            yield
    except CaptureError as error:
        with hint(WAITING_HINT):
            raise AssertionError(f"{what}: {error}") from error


# Task 7.1 -----------------------------------------------------------------------------------------------------------------


class Place:
    """Batch rows and a cache with blocks of four slots; ``step`` plays one step of the engine's, on counts alone."""

    def __init__(self, chapter: Any, seats: int = 4, num_blocks: int = 60) -> None:
        shape: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
        shape |= {"block_size": 4, "num_blocks": num_blocks, "max_num_seqs": seats, "max_model_len": 40}
        self.config = PageBrainConfig(max_num_batched_tokens=64, **shape)
        self.cache = ch02_block_table.PagedCache(ch02_block_table.BlockManager(self.config), self.config)
        (dummy_block,) = self.cache.block_manager.allocate(1)
        self.rows = chapter.BatchRows(self.config, dummy_block)
        self.state = self.rows.state
        self.address = self.state.data_ptr()
        self.sent: list[list[tuple[int, int, int]]] = []
        send = self.rows.send

        def watched(changes: Any) -> None:
            changes = list(changes)
            if changes:
                self.sent.append(changes)
            send(changes)

        self.rows.send = watched
        self.story: list[str] = []
        self.ahead = 0

    def entry(self, seq: Sequence, count: int) -> ScheduledSequence:
        """A part of the step, with blocks for it and for ``self.ahead`` tokens more."""
        start = seq.num_scheduled
        self.cache.grow(seq.seq_id, start + count + self.ahead)
        return ScheduledSequence(seq, start, count, samples=start + count == seq.num_tokens)

    def update(self, *parts: tuple[Sequence, int]) -> list[int]:
        """Call ``update`` for parts ``(sequence, tokens)``; then the step changes the rows, as a step does."""
        group = SequenceGroup(tuple(self.entry(seq, count) for seq, count in parts))
        self.sent.clear()
        self.story.append("update for " + ", ".join(f"{e.seq.seq_id} from {e.start} to {e.context_len}" for e in group))
        expected = self.state.clone()
        with without_waiting("update"):
            got = self.rows.update(group, self.cache)
        for row, column, number in (change for changes in self.sent for change in changes):
            expected[row, column] = number
        with hint(
            "Collect (row, column, number) in a list, and give the list to self.send: all of it travels in one piece."
        ):
            assert torch.equal(self.state, expected), (
                f"update wrote into `state` past `send`: each number would be a launch of its own. {self.told}"
            )
        assert len(self.sent) <= 1, (
            f"update called send {len(self.sent)} times: each is a copy of its own, so collect the changes. {self.told}"
        )
        assert self.rows.state is self.state and self.state.data_ptr() == self.address, (
            f"update bound `state` to another tensor: a graph still reads the old one. {self.told}"
        )
        assert isinstance(got, list) and len(got) == len(group), (
            f"update returned {got} for {len(group)} entries. {self.told}"
        )
        return got

    def release(self, seq_id: int) -> None:
        """Call ``release``."""
        self.story.append(f"release({seq_id})")
        row = self.rows.row_of.get(seq_id)
        alone = "" if row is not None else f" Sequence {seq_id} has no row, and one that has none is left alone."
        try:
            with without_waiting("release"):
                self.rows.release(seq_id)
        except LookupError as error:
            if not alone:
                raise
            said = f"release({seq_id}) raised {type(error).__name__}: {error}.{alone} {self.told}"
            raise AssertionError(said) from None
        free = self.rows.free
        assert all(isinstance(row, int) for row in free), (
            f"after release({seq_id}), free is {free}: it should have row numbers only.{alone} {self.told}"
        )
        with hint(
            "The row goes back to `free`, and the next new sequence may take it. Row 0 is a row like the others, and Python "
            "takes the number 0 for false."
        ):
            assert row is None or row in free, (
                f"release({seq_id}) did not put row {row} back into `free`, which is {free}. {self.told}"
            )

    @property
    def told(self) -> str:
        return f"What happened: {'; '.join(self.story)}"

    def check_row(self, row: int, seq: Sequence, token: int, context_len: int) -> None:
        """What the row must say."""
        table = list(self.cache.block_table(seq.seq_id))
        for name, now, must in (
            ("token_ids", int(self.rows.token_ids[row]), token),
            ("context_lens", int(self.rows.context_lens[row]), context_len),
            ("block_tables", self.rows.block_tables[row, : len(table)].tolist(), table),
        ):
            said = f"`{name}` of row {row}, sequence {seq.seq_id}'s, should be {must} but is {now}"
            if now != must and name != "block_tables" and [now] == table[(name == "context_lens") :][:1]:
                with hint(
                    "state[row, BLOCKS + page] is the table's entry for a page. TOKEN and CONTEXT are columns 0 and 1."
                ):
                    pytest.fail(f"{said}: {now} is a block of the table, whose columns begin at BLOCKS. {self.told}")
            assert now == must, f"{said}. {self.told}"


@pytest.mark.task("7.1", hint="A new sequence: the token at entry.start, entry.start itself, and every block of its table.")
def test_all_about_a_new_sequence_travels(chapter: Any, seed: int) -> None:
    for start in (0, 3, random.Random(seed).randrange(4, 9)):  # chunks before it may have been computed elsewhere
        place = Place(chapter)
        seq = make_sequence(1, 14)
        seq.num_scheduled = start
        (row,) = place.update((seq, 5))
        place.check_row(row, seq, seq.token_ids[start], start)


@pytest.mark.task("7.1", hint="A row is removed from free when it is taken. Return the rows in the order of the group.")
def test_every_sequence_has_a_row_of_its_own(chapter: Any, seed: int) -> None:
    place = Place(chapter)
    seqs = [make_sequence(number, 5) for number in (9, 2, 30, 4)]
    random.Random(seed).shuffle(seqs)
    got = place.update(*((seq, 5) for seq in seqs))
    assert len(set(got)) == 4, f"update gave the rows {got}: two sequences share one. {place.told}"
    assert set(got) <= set(range(8)), f"update gave the rows {got}; {place.rows.dummy_row} is the dummy sequence's"
    assert sorted(place.rows.free) == sorted(set(range(8)) - set(got)), f"rows {got} are held, but free is {place.rows.free}"
    for row, seq in zip(got, seqs, strict=True):
        place.check_row(row, seq, seq.token_ids[0], 0)
        assert place.rows.row_of[seq.seq_id] == row, f"row_of is {place.rows.row_of}, but update returned {got}"
    again = place.update(*((seq, 1) for seq in reversed(seqs)))
    assert again == got[::-1], f"update gave {got}, then for the same sequences in reverse order {again}. {place.told}"


class Lives:
    """Two sequences at work, each after its prompt; the steps have changed the rows, as decodes do."""

    def __init__(self, chapter: Any) -> None:
        self.place = Place(chapter)
        self.seqs = [make_sequence(number, 6) for number in (1, 2)]
        self.rows = self.place.update(*((seq, 6) for seq in self.seqs))
        for row, seq in zip(self.rows, self.seqs, strict=True):
            seq.num_scheduled = 6
            seq.token_ids.append(7)  # known to the host by now; the GPU is a step ahead of it
            self.place.state[row] = 50_000 + torch.arange(self.place.state.shape[1])
        self.place.story.append("all columns were then overwritten on the GPU with 50000 and more, to see what travels")
        self.before = self.place.state.clone()

    def check(self, expected: dict[tuple[int, int], int]) -> None:
        """Exactly these columns were written, ``{(row, column): number}``."""
        changed = torch.nonzero(self.place.state != self.before).tolist()
        for row, column in changed:
            assert (row, column) in expected, (
                f"column {column} of row {row} was sent again: the GPU has it, and newer perhaps. Columns 0 and 1 are token "
                f"and context length, 2 is the first block. {self.place.told}"
            )
        for (row, column), number in expected.items():
            got = int(self.place.state[row, column])
            assert got == number, f"column {column} of row {row} should be {number} but is {got}. {self.place.told}"


@pytest.mark.task("7.1", hint="num_sent knows how many blocks the row has. If the table has not grown, nothing travels.")
def test_what_the_gpu_knows_does_not_travel_again(chapter: Any) -> None:
    lives = Lives(chapter)
    lives.place.update(*((seq, 1) for seq in lives.seqs))
    lives.check({})


@pytest.mark.task("7.1", hint="Of a table that has grown, the blocks from num_sent on travel, into the columns that follow.")
@pytest.mark.parametrize("count", [3, 4, 12])
def test_only_the_blocks_that_a_table_has_grown_by_travel(chapter: Any, count: int) -> None:
    lives = Lives(chapter)
    first, second = lives.seqs
    second.token_ids += range(count)
    lives.place.update((first, 1), (second, count))
    table = lives.place.cache.block_table(second.seq_id)
    assert len(table) > 2
    lives.check({(lives.rows[1], 2 + page): table[page] for page in range(2, len(table))})


@pytest.mark.task(
    "7.1", hint="A table may have more blocks than this step uses. All of them travel, and num_sent counts them."
)
@pytest.mark.parametrize("ahead", [3, 9])
def test_blocks_that_came_early_travel_once(chapter: Any, ahead: int) -> None:
    place = Place(chapter)
    place.ahead = ahead
    seq = make_sequence(1, 6)
    (row,) = place.update((seq, 6))
    place.check_row(row, seq, seq.token_ids[0], 0)
    seq.num_scheduled, place.ahead = 6, 0
    seq.token_ids.append(7)
    place.update((seq, 1))
    assert not place.sent, f"the table has not grown, but update sent {place.sent[0]} again. {place.told}"


@pytest.mark.task("7.1", hint="The row goes back to free. Remove the sequence from row_of and from num_sent.")
def test_a_row_comes_back_and_serves_another(chapter: Any) -> None:
    place = Place(chapter, seats=1)  # two rows
    old, other = make_sequence(1, 20), make_sequence(2, 3)
    place.update((old, 20), (other, 3))
    place.release(1)
    place.cache.free(1)
    assert len(place.rows.free) == 1, f"one of two rows was released, but free is {place.rows.free}. {place.told}"
    new = make_sequence(3, 7)
    (row,) = place.update((new, 7))
    place.check_row(row, new, new.token_ids[0], 0)
    place.check_row(place.rows.row_of[2], other, other.token_ids[0], 0)
    for seq_id in (2, 3):
        place.release(seq_id)
    with hint("Every row comes back. Row 0 is a row like the others, and Python takes the number 0 for false."):
        assert sorted(place.rows.free) == [0, 1], f"both rows were released, but free is {place.rows.free}. {place.told}"


@pytest.mark.task(
    "7.1",
    hint="release must also forget num_sent. A sequence that comes again is as new: it may have other blocks, and all "
    "of it travels.",
)
def test_a_sequence_that_comes_again_is_new(chapter: Any) -> None:
    place = Place(chapter)
    seq = make_sequence(1, 10)
    place.update((seq, 10))
    place.release(1)
    place.cache.free(1)
    place.cache.grow(99, 8)  # another sequence has its old blocks now
    (row,) = place.update((seq, 10))
    place.check_row(row, seq, seq.token_ids[0], 0)


@pytest.mark.task(
    "7.1", hint="The same sequences may have other rows than before. Nothing that update returned may be kept."
)
def test_a_group_of_the_same_sequences_is_looked_at_anew(chapter: Any, seed: int) -> None:
    place = Place(chapter, seats=2)
    seqs = [make_sequence(number, 4) for number in (1, 2)]
    place.update(*((seq, 4) for seq in seqs))
    for seq_id in random.Random(seed).sample((1, 2), 2):
        place.release(seq_id)
    other = make_sequence(3, 4)
    place.update((other, 4))
    place.update(*((seq, 4) for seq in reversed(seqs)))
    got = place.update(*((seq, 4) for seq in seqs))
    rows = [place.rows.row_of[seq.seq_id] for seq in seqs]
    assert got == rows, f"row_of says {rows}, but update returned {got}, as if it had kept an earlier answer. {place.told}"
    for row, seq in zip(got, seqs, strict=True):
        place.check_row(row, seq, seq.token_ids[0], 0)


@pytest.mark.task("7.1", hint="release is also called for sequences that never had a row, and then nothing happens.")
def test_releasing_who_has_no_row_changes_nothing(chapter: Any) -> None:
    place = Place(chapter)
    place.release(5)
    place.update((make_sequence(1, 3), 3))
    place.release(1)
    place.release(1)
    assert sorted(place.rows.free) == list(range(8)), f"all 8 rows are free again, but free is {place.rows.free}"


@pytest.mark.task("7.1", hint="Sequences arrive, take part in steps and leave. Follow the one that the message names.")
def test_rows_follow_whoever_comes_and_goes(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    place = Place(chapter)
    at_work: dict[int, Sequence] = {}
    known: dict[int, tuple[int, int]] = {}  # token and context length in the row
    for number in range(60):
        place.story[:-6] = []
        if len(at_work) < 4 and choose.random() < 0.6:
            at_work[number] = make_sequence(number, choose.randint(1, 15))
        if at_work and choose.random() < 0.3:
            gone = choose.choice(list(at_work))
            del at_work[gone]
            known.pop(gone, None)
            place.release(gone)
            place.cache.free(gone)
        parts = [(seq, choose.randint(1, seq.num_tokens - seq.num_scheduled)) for seq in at_work.values()]
        choose.shuffle(parts)
        rows = place.update(*parts)
        for row, (seq, count) in zip(rows, parts, strict=True):
            place.check_row(row, seq, *known.get(seq.seq_id, (seq.token_ids[0], 0)))
            seq.num_scheduled += count
            if seq.num_scheduled == seq.num_tokens and seq.num_tokens < 40:
                seq.token_ids.append(500 + number)
            elif seq.num_scheduled == seq.num_tokens:
                at_work.pop(seq.seq_id)
                place.release(seq.seq_id)
                place.cache.free(seq.seq_id)
                known.pop(seq.seq_id, None)
                continue
            known[seq.seq_id] = 9_000 + number, seq.num_scheduled  # not what the host would have sent
            place.rows.token_ids[row], place.rows.context_lens[row] = known[seq.seq_id]
        for seq_id in at_work.keys() & known.keys():
            row = place.rows.row_of[seq_id]
            place.check_row(row, at_work[seq_id], *known[seq_id])
    assert len(place.rows.free) == 8 - len(known), f"{len(known)} sequences have rows, but free is {place.rows.free}"


# Task 7.2 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.task(
    "7.2", hint="Take the smallest of the buckets that are large enough. A bucket of exactly num_rows is large enough."
)
def test_the_smallest_bucket_that_is_large_enough(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    buckets = [1, 2, 4, 8, 12]
    for num_rows, expected in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)):
        choose.shuffle(buckets)
        got = chapter.bucket_for(num_rows, buckets)
        assert got == expected, f"bucket_for({num_rows}, {buckets}) should be {expected} but is {got}"


@pytest.mark.task("7.2", hint="Buckets are any numbers, in any order. Choose among those that you are given.")
def test_buckets_may_be_any_numbers(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(40):
        buckets = choose.sample(range(1, 60), choose.randint(1, 6))
        num_rows = choose.randint(1, max(buckets))
        expected = sorted(bucket for bucket in buckets if bucket >= num_rows)[0]
        given = list(buckets)
        got = chapter.bucket_for(num_rows, buckets)
        assert got == expected, f"bucket_for({num_rows}, {given}) should be {expected} but is {got}"
        assert buckets == given, f"the list that bucket_for was given is {buckets} now: it is the caller's"


@pytest.mark.task("7.2", hint="If no bucket is large enough, rows would be left out of the step: raise ValueError.")
def test_more_rows_than_any_bucket_holds_are_refused(chapter: Any) -> None:
    for buckets in ([1, 2, 4], [4, 1]):
        with pytest.raises(ValueError):
            pytest.fail(f"bucket_for(5, {buckets}) should raise ValueError but returned {chapter.bucket_for(5, buckets)}")


class Watcher:
    """Batch rows, and a step captured over the first ``bucket`` active rows that copies them out: all that a graph sees."""

    def __init__(self, chapter: Any, seats: int = 8) -> None:
        self.rows = Place(chapter, seats).rows
        self.seen = {bucket: torch.zeros(bucket, dtype=torch.int64) for bucket in (1, 2, 3, 4, 6, 8)}
        active = self.rows.active_rows
        self.replay = {
            bucket: capture(lambda out=out: out.copy_(active[: len(out)]), CPU)  # type: ignore[misc]
            for bucket, out in self.seen.items()
        }
        self.calls: list[str] = []

    @property
    def story(self) -> str:
        return f"What was called: {'; '.join(self.calls)}"

    def activate(self, names: Iterable[int], bucket: int) -> None:
        names = list(names)
        given = list(names)
        self.calls.append(f"activate({names}, {bucket})")
        with without_waiting("activate"):
            self.rows.activate(names, bucket)
        assert names == given, f"the list that activate was given is {names} now: it is the caller's"
        self.replay[bucket]()
        expected = given + [self.rows.dummy_row] * (bucket - len(given))
        got = self.seen[bucket].tolist()
        now = self.rows.active_rows[:bucket].tolist()
        assert got == expected or now != expected, (
            f"active_rows was bound to a new tensor: it says {now}, but a step captured before reads {got}. {self.story}"
        )
        assert got == expected, (
            f"a captured step of bucket {bucket} should see the active rows {expected} "
            f"({self.rows.dummy_row} is the dummy's) but sees {got}. {self.story}"
        )


@pytest.mark.task("7.2", hint="Write into the tensor that is there, with copy_ or an index: a graph knows its address.")
def test_a_captured_step_sees_the_rows_that_were_named(chapter: Any) -> None:
    watcher = Watcher(chapter)
    watcher.activate([3, 0, 7, 5], 4)
    watcher.activate([11, 2, 1, 6, 9, 4, 15, 0], 8)
    watcher.activate([4], 1)


@pytest.mark.task(
    "7.2", hint="The entries past the rows are dummy_row. Without padding, rows of an earlier step would stand there."
)
def test_the_rest_of_the_bucket_is_the_dummys(chapter: Any) -> None:
    watcher = Watcher(chapter)
    watcher.activate([3, 0, 7, 5], 4)
    watcher.activate([7, 3, 5], 4)
    watcher.activate([2, 6, 1, 9, 12], 8)
    watcher.activate([5], 4)
    watcher.activate([], 2)
    watcher.activate([11, 10, 9, 8, 7, 6], 6)
    watcher.activate([11, 10], 2)
    watcher.activate([11, 10], 6)  # the same rows in a larger bucket


@pytest.mark.task("7.2", hint="The order of rows is the order in which tokens come back: keep it.")
def test_any_rows_in_any_order(chapter: Any, seed: int) -> None:
    choose, watcher = random.Random(seed), Watcher(chapter)
    for _ in range(40):
        bucket = choose.choice([1, 2, 3, 4, 6, 8])
        watcher.calls = []
        watcher.activate(choose.sample(range(16), choose.randint(bucket // 2, bucket)), bucket)


class Writes(TorchDispatchMode):
    """Counts what is launched to change a tensor's memory, and numbers that come from the host past ``upload``."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.memory, self.count, self.is_uploading = tensor.untyped_storage().data_ptr(), 0, False
        self.from_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each operation."""
        if func is torch.ops.aten.lift_fresh.default and not self.is_uploading:
            self.from_host.append(str(func))
        is_own = args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() == self.memory
        self.count += bool(is_own and func._schema.is_mutable)
        return func(*args, **(kwargs or {}))


@pytest.mark.task(
    "7.2",
    hint="Make one list of the rows and the padding, upload it in one piece, and copy that into active_rows[:bucket].",
)
def test_all_names_travel_in_one_upload(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Place(chapter, 8).rows
    uploads: list[list[int]] = []
    upload = chapter.upload
    for names, bucket in (([3, 0, 7, 5, 2], 8), ([4, 1], 2), ([6], 6)):
        uploads.clear()
        writes = Writes(rows.active_rows)

        def counted(numbers: Any, device: Any, writes: Writes = writes) -> Tensor:
            uploads.append(list(numbers))
            writes.is_uploading = True
            try:
                return upload(numbers, device)
            finally:
                writes.is_uploading = False

        monkeypatch.setattr(chapter, "upload", counted)
        with writes:
            rows.activate(names, bucket)
        said = f"activate({names}, {bucket})"
        with hint("A plain torch.tensor, or tensor[i] = number, is a copy for which the host waits on a GPU. Use `upload`."):
            assert not writes.from_host, f"{said} brought numbers to the device without `upload`"
        assert len(uploads) == 1, f"{said} called `upload` {len(uploads)} times: all rows travel in one"
        assert writes.count <= 2, (
            f"{said} changed active_rows with {writes.count} operations, each of which is a launch: one copy is enough"
        )


# Task 7.3 -----------------------------------------------------------------------------------------------------------------


CAPTURE_HINTS = {
    "came from the host": "`zero_()` and `fill_()` launch a kernel. `x[i] = 0` and `torch.tensor` copy one from the host.",
    "shape depends": "Every shape is fixed when the step is captured. Compute all rows of the bucket, and choose none.",
    "": "The host may not read a value of the GPU's in the step: all that differs from step to step stays in tensors.",
}
"""A part of a ``CaptureError`` -> what to do."""


class Texts:
    """Texts of different lengths in a cache of which every unused slot holds a large value, each with its batch row.

    All but a text's last token are cached, as Hugging Face computes their K and V. The last is the next to compute.
    """

    def __init__(
        self,
        chapter: Any,
        seed: int,
        lengths: Iterable[int] = (1, 4, 5, 9),
        block_size: int = 4,
        seats: int = 8,
        **shape: Any,
    ) -> None:
        self.chapter = chapter
        self.model = random_gpt2(seed=seed, **shape)
        self.config = PageBrainConfig.for_model(
            self.model, block_size=block_size, num_blocks=30 + 160 // block_size, max_num_seqs=seats, max_model_len=32
        )
        self.cache = ch02_block_table.PagedCache(ch02_block_table.BlockManager(self.config), self.config)
        poison(self.cache)
        (self.dummy_block,) = self.cache.block_manager.allocate(1)
        for pool in (self.cache.key_pools, self.cache.value_pools):
            pool[:, self.dummy_block] = 0
        self.rows = chapter.BatchRows(self.config, self.dummy_block)
        self.logits = torch.full((seats, 97), POISON, dtype=torch.float64)
        self.sampled = torch.full((seats,), -1)
        choose = random.Random(seed)
        self.texts = [[choose.randrange(96) for _ in range(length)] for length in lengths]
        self.row_of = choose.sample(range(self.rows.dummy_row), len(self.texts))
        for number in choose.sample(range(len(self.texts)), len(self.texts)):
            self.cache.grow(number, len(self.texts[number]) + 12)  # far enough for the decodes that follow
        for number, (text, row) in enumerate(zip(self.texts, self.row_of, strict=True)):
            self.set_row(row, text[-1], len(text) - 1, self.cache.block_table(number))
            if len(text) > 1:
                cached = hf_cache(self.model, text[:-1])
                slots = torch.tensor(self.cache.slots(number, 0, len(text) - 1))
                for pool, name in ((self.cache.key_pools, "keys"), (self.cache.value_pools, "values")):
                    pool.flatten(1, 2)[:, slots] = cached[name].transpose(0, 1)
        self.tensors = [self.rows.state, self.rows.active_rows, self.logits, self.sampled]

    def set_row(self, row: int, token: int, context_len: int, table: Iterable[int]) -> None:
        table = list(table)
        self.rows.state[row, :2] = torch.tensor([token, context_len])
        self.rows.state[row, 2 : 2 + len(table)] = torch.tensor(table)

    def activate(self, numbers: Iterable[int], bucket: int) -> list[int]:
        """These texts, and the dummy in what is left of the bucket."""
        numbers = list(numbers)
        padded = [self.row_of[number] for number in numbers] + [self.rows.dummy_row] * (bucket - len(numbers))
        self.rows.active_rows[:bucket] = torch.tensor(padded)
        self.active, self.before = padded, self.rows.state.clone()
        return numbers

    def step(self, bucket: int) -> None:
        """The learner's step, once."""
        try:
            self.chapter.decode_step(self.model, self.cache, self.rows, self.logits[:bucket], self.sampled[:bucket])
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error) and "out of range" not in str(error):
                raise
            with hint(
                "The position of a row's token is `context_lens` itself: so many tokens are cached before it. The first "
                "token of a text has position 0. Its page is position // block_size."
            ):
                raise

    def capture(self, bucket: int) -> Any:
        """The learner's step, captured while only the dummy is active."""
        self.rows.active_rows.fill_(self.rows.dummy_row)
        try:
            return capture(lambda: self.step(bucket), CPU)
        except CaptureError as error:
            told = next((told for sign, told in CAPTURE_HINTS.items() if sign in str(error)), CAPTURE_HINTS[""])
            with hint(told):
                raise AssertionError(f"decode_step cannot be captured: {error}") from error

    def check_slots(self, numbers: list[int], what: str) -> None:
        """K of each text's newest token is in the token's slot: something was written there."""
        for number in numbers:
            position, table = len(self.texts[number]) - 1, self.cache.block_table(number)
            block, offset = table[position // self.config.block_size], position % self.config.block_size
            with hint("The slot is block * block_size + offset, the block is the table's entry for the token's page."):
                assert not (self.cache.key_pools[:, block, offset] == POISON).all(), (
                    f"{what}: nothing was written into the slot of token {position} of text {number}. Its table is {table}, "
                    f"so it is at offset {offset} of block {block}, slot {block * self.config.block_size + offset}"
                )

    def check(
        self, numbers: list[int], what: str, names: tuple[str, ...] = ("logits", "sampled", "token", "context")
    ) -> None:
        """After a step of these texts: the scores, the token, and the row; the texts go on by the right token."""
        for name, tensor, unwritten in (("logits", self.logits, POISON), ("sampled", self.sampled, -1)):
            assert name not in names or not (tensor[: len(numbers)] == unwritten).all(), (
                f"{what}: nothing was written into the tensor `{name}` that decode_step was given. If you bound the name to "
                f"a new tensor (`{name} = ...`), the caller does not see that one: use `{name}.copy_`"
            )
        for place, number in enumerate(numbers):
            text, row = self.texts[number], self.row_of[number]
            expected = hf_logits(self.model, text)[-1]
            best = int(expected.argmax())
            who = f"{what}: text {number}, of {len(text)} tokens, in row {row}, active row {place}"
            if "logits" in names:
                assert_same(self.logits[place], expected, what=f"{who}: the scores in `logits`", axes=("score",))
            for name, got, must in (
                ("sampled", int(self.sampled[place]), best),
                ("token", int(self.rows.token_ids[row]), best),
                ("context", int(self.rows.context_lens[row]), len(text)),
            ):
                label = {"sampled": "`sampled`", "token": "`token_ids` of its row", "context": "`context_lens` of its row"}
                before = {"token": text[-1], "context": len(text) - 1}.get(name)
                column = f"rows.{label[name].partition('`')[2].partition('`')[0]}[active]"
                as_before = (
                    f". That is what it was before the step. Indexing with a tensor makes a copy: `{column}.add_(1)` or "
                    f"`.copy_` changes the copy only, `{column} = ...` the row"
                )
                if got == before and (others := self.changed_rows()):
                    as_before = (
                        f". That is what it was before the step. Instead row {others[0]} changed, which is not active: "
                        f"`active_rows` names the rows, and {column} = ... writes to them"
                    )
                assert name not in names or got == must, (
                    f"{who}: {label[name]} should be {must} but is {got}{as_before if got == before else ''}"
                )
            text.append(best)
        dummy = int(self.rows.context_lens[self.rows.dummy_row])
        with hint("Set it to 0, whatever it was (zero_): in a step without padding it does not grow."):
            assert "context" not in names or dummy == 0, (
                f"{what}, {counted(self.active.count(self.rows.dummy_row), 'padding row')}: the context of the dummy "
                f"sequence is {dummy} afterwards, and must be 0"
            )

    def changed_rows(self) -> list[int]:
        """Rows that are not active and have changed all the same, without the dummy's."""
        changed = torch.nonzero((self.rows.state != self.before).any(1)).flatten().tolist()
        return [row for row in changed if row not in (*self.active, self.rows.dummy_row)]

    def check_cache(self, what: str) -> None:
        """Every slot of every text is Hugging Face's, and every other slot is untouched, but for the dummy's block."""
        keys, values = (torch.full_like(pool, POISON) for pool in (self.cache.key_pools, self.cache.value_pools))
        for number, text in enumerate(self.texts):
            length = int(self.rows.context_lens[self.row_of[number]])
            if length:
                cached = hf_cache(self.model, text[:length])
                slots = torch.tensor(self.cache.slots(number, 0, length))
                keys.flatten(1, 2)[:, slots] = cached["keys"].transpose(0, 1)
                values.flatten(1, 2)[:, slots] = cached["values"].transpose(0, 1)
        for name, pool, expected in (("keys", self.cache.key_pools, keys), ("values", self.cache.value_pools, values)):
            expected[:, self.dummy_block] = pool[:, self.dummy_block]
            axes = ("layer", "block", "offset", "head", "dim")
            assert_same(pool, expected, what=f"{what}: the cached {name}", axes=axes, where=self.owner)

    def owner(self, place: tuple[int, ...]) -> str:
        """Which text a slot belongs to."""
        block_id = place[1]
        for number in range(len(self.texts)):
            if block_id in (table := self.cache.block_table(number)):
                position = table.index(block_id) * self.config.block_size + place[2]
                return f"token {position} of text {number}, which has {len(self.texts[number])} tokens"
        return "a block that no text holds"


@pytest.mark.task(
    "7.3", hint="token_ids, positions and tables of the active rows, forward with attend_rows; then logits.copy_."
)
@pytest.mark.parametrize("shape", [{}, {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}], ids=["plain", "scaled"])
@pytest.mark.parametrize("block_size", [4, 1, 16])
def test_scores_are_those_of_hugging_face(chapter: Any, seed: int, shape: dict[str, Any], block_size: int) -> None:
    texts = Texts(chapter, seed, (1, 4, 5, 9, 16, 17), block_size, **shape)
    numbers = texts.activate([4, 0, 3, 1, 5, 2], 6)
    texts.step(6)
    texts.check_slots(numbers, "one step")
    texts.check(numbers, "one step", names=("logits",))


@pytest.mark.task(
    "7.3", hint="The best token goes to two places, sampled and token_ids of the row; the context grows by one."
)
def test_the_row_holds_what_the_next_step_computes(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed)
    numbers = texts.activate([2, 0, 3, 1], 4)
    texts.step(4)
    texts.check(numbers, "one step")
    texts.activate(numbers[::-1], 4)
    texts.step(4)
    texts.check(numbers[::-1], "a second step, in reverse order")


@pytest.mark.task(
    "7.3", hint="The slot is block * block_size + offset, the block is the table's entry for the token's page."
)
def test_keys_and_values_go_to_their_slots(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed, (1, 4, 5, 8, 9))
    numbers = texts.activate([3, 1, 4, 0, 2], 5)
    for turn in range(3):
        texts.step(5)
        texts.check(numbers, f"step {turn}", names=())
        texts.check_cache(f"after step {turn}")


@pytest.mark.task("7.3", hint="Only active rows change, and only the first len(sampled) of active_rows are active.")
def test_rows_that_are_not_active_stay_as_they_are(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed)
    texts.activate([0, 1, 2, 3], 4)
    numbers = texts.activate([3, 1], 2)  # the other two still stand behind them
    before = texts.rows.state.clone()
    texts.step(2)
    texts.check(numbers, "a step of two rows")
    others = [row for row in range(len(before) - 1) if row not in (texts.row_of[3], texts.row_of[1])]
    what = "rows that are not active: the numbers in `state`"
    assert_same(texts.rows.state[others], before[others], what=what, axes=("row (not active)", "column"))
    assert (texts.logits[2:] == POISON).all(), "`logits` was written past its first two rows"
    assert (texts.sampled[2:] == -1).all(), "`sampled` was written past its first two places"


@pytest.mark.task(
    "7.3", hint="Set context_lens of dummy_row to 0 after each step. If it grows, it passes the end of the table."
)
def test_padding_writes_into_the_dummys_block_and_nowhere_else(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed)
    numbers = texts.activate([1, 3, 0], 8)
    for turn in range(10):
        texts.step(8)
        texts.check(numbers, f"step {turn}, padded by five dummies", names=("logits", "token"))
        dummy = int(texts.rows.context_lens[texts.rows.dummy_row])
        assert dummy == 0, f"after step {turn} the dummy sequence has {dummy} tokens of context: it should stay at 0"
    texts.check_cache("after ten steps, each padded by five dummies")


@pytest.mark.task(
    "7.3", hint="A replay runs no Python. Which value did decode_step read when it was captured, and not again?"
)
def test_a_captured_step_does_what_the_rows_say_when_it_is_replayed(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed, (1, 4, 5, 9, 12))
    replay = {bucket: texts.capture(bucket) for bucket in (8, 4, 1)}
    addresses = [tensor.data_ptr() for tensor in texts.tensors]
    for turn, (names, bucket) in enumerate(
        (([2], 1), ([0, 3, 1, 4], 4), ([4, 0], 8), ([1, 2, 3], 4), ([2, 4, 1], 4), ([3], 1))
    ):
        numbers = texts.activate(names, bucket)
        replay[bucket]()
        texts.check(numbers, f"replay {turn}, of bucket {bucket}")
    now = [texts.rows.state, texts.rows.active_rows, texts.logits, texts.sampled]
    assert [tensor.data_ptr() for tensor in now] == addresses, "a buffer was bound to another tensor"
    texts.check_cache("after six replays")


@pytest.mark.task(
    "7.3", hint="A table's entries past a text's blocks may be blocks of other sequences. What is in them is masked."
)
def test_a_captured_step_sees_blocks_that_came_later(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed, (3, 7))
    replay = texts.capture(2)
    for number, row in enumerate(texts.row_of):  # only the blocks that are needed, and behind them the other text's
        table = texts.cache.block_table(number)
        needed = -(-len(texts.texts[number]) // 4)
        texts.rows.block_tables[row] = texts.cache.block_table(1 - number)[0]
        texts.rows.block_tables[row, :needed] = torch.tensor(table[:needed])
    for turn in range(8):
        for number, row in enumerate(texts.row_of):
            page = (len(texts.texts[number]) - 1) // 4
            texts.rows.block_tables[row, page] = texts.cache.block_table(number)[page]
        numbers = texts.activate([1, 0], 2)
        replay()
        texts.check(numbers, f"replay {turn}")
    texts.check_cache("after eight replays")


class OwnTensors(TorchFunctionMode):
    """Refuses tensors that are made without ``device``, except in ``given`` functions of a chapter, which it wraps."""

    makers = frozenset(
        {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}
    )

    def __init__(self, chapter: Any, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
        super().__init__()
        self.depth = 0
        for name in given:
            monkeypatch.setattr(chapter, name, self.uncounted(getattr(chapter, name)))

    def uncounted(self, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each of its functions."""
        name = getattr(func, "__name__", "")
        if name in self.makers and not self.depth and (kwargs or {}).get("device") is None:
            raise CaptureError(f"a tensor was made on the host (torch.{name} without `device`)")
        return func(*args, **(kwargs or {}))


@pytest.mark.task(
    "7.3",
    hint="Make tensors on the device of the rows: device=rows.device. Without it they are the host's, and a captured step "
    "can copy nothing from the host.",
)
def test_every_tensor_is_made_on_the_device(chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the host's memory is the device's, so here only the missing argument can be seen."""
    texts = Texts(chapter, seed, (3, 7))
    texts.activate([1, 0], 2)
    with OwnTensors(chapter, monkeypatch, "forward", "attend_rows"):
        texts.step(2)


@pytest.mark.task("7.3", hint="One call of forward computes the scores. The best token is their argmax; nothing runs twice.")
def test_a_step_runs_the_model_once_and_copies_no_pool(chapter: Any, seed: int) -> None:
    texts = Texts(chapter, seed, (3, 7))
    numbers = texts.activate([1, 0], 2)
    with Recording() as recording:
        texts.step(2)
    texts.check(numbers, "one step")
    norms = sum(func is torch.ops.aten.native_layer_norm.default for func, *_ in recording.operations)
    layers = texts.model.config.n_layer
    assert norms <= 2 * layers + 1, (
        f"one step of {layers} layers computed {norms} layer norms, one run of the model {2 * layers + 1}: it ran twice"
    )
    pool = texts.cache.key_pools[0].numel()
    for func, args, kwargs, result in recording.operations:
        known = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.data_ptr() not in known]
        with hint("Gather the pages of the active rows' tables, as attend_rows does. The pool is too large to be copied."):
            assert all(func.is_view or tensor.numel() < pool for tensor in made), (
                f"{func} made a tensor of {max(tensor.numel() for tensor in made)} numbers in a step of two "
                f"rows: that is as "
                f"large as the K pool of a whole layer ({pool})"
            )


# Task 7.4 -----------------------------------------------------------------------------------------------------------------


class Launches:
    """In the executor's place: a sequence's next token is a hash of all before it, known when the step is launched.

    As on a GPU, the tokens are known only after a wait. ``log`` has what was launched and waited for, in order.
    """

    def __init__(self, model: Any, config: PageBrainConfig, cache: Any, use_graphs: bool, keep_logits: bool) -> None:
        (dummy_block,) = cache.block_manager.allocate(1)
        self.model, self.cache, self.keep_logits = model, cache, keep_logits
        self.rows = self.rows_class(config, dummy_block)
        self.rows.release = lambda seq_id: None
        self.active: list[int] = []
        self.steps: dict[int, Any] = {}
        self.log: list[tuple[str, int]] = []
        self.groups: list[SequenceGroup] = []
        self.texts: dict[int, list[int]] = {}
        self.in_flight: list[int] = []
        self.most = 0

    def launch(self, group: SequenceGroup) -> Any:
        number = len(self.groups)
        self.groups.append(group)
        self.log.append(("launch", number))
        self.in_flight.append(number)
        self.most = max(self.most, len(self.in_flight))
        # Decodes first, then prompts, each from the last to the first, so the order differs from the group's.
        sampling = sorted((e for e in group if e.samples), key=lambda e: (e.num_tokens > 1, -e.seq.seq_id))
        tokens = []
        for entry in group:
            seq = entry.seq
            assert not seq.is_finished, f"step {number} was launched with sequence {seq.seq_id}, which had ended"
            assert entry.context_len < seq.max_num_tokens, f"step {number} goes past the limit of sequence {seq.seq_id}"
            text = self.texts.setdefault(seq.seq_id, list(seq.request.prompt_token_ids))
            if entry.samples:
                text[entry.context_len :] = [next_token(text[: entry.context_len]) % 97]
        for entry in sampling:
            tokens.append(self.texts[entry.seq.seq_id][entry.context_len])
        scores = torch.tensor([[float(token)] for token in tokens]) if self.keep_logits else None

        def wait() -> list[int]:
            if number in self.in_flight:  # a second wait is over at once
                self.log.append(("wait", number))
                self.in_flight.remove(number)
            return list(tokens)

        return self.in_flight_class(group, sampling, SimpleNamespace(wait=wait), scores)

    in_flight_class: Any = None
    rows_class: Any = None


class Loop:
    """An engine of the chapter's, whose executor is :class:`Launches` and whose blocks come back as they should."""

    def __init__(self, chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool, **limits: int) -> None:
        classes = {"in_flight_class": chapter.InFlight, "rows_class": chapter.BatchRows}
        monkeypatch.setattr(chapter, "Executor", type("Executor", (Launches,), classes))
        monkeypatch.setattr(chapter.LateRetirement, "collect", collect)
        monkeypatch.setattr(chapter.Scheduler, "make_room", make_room)
        self.model = random_gpt2(seed=5)
        settings = {"block_size": 4, "num_blocks": 60, "max_num_seqs": 4, "max_num_batched_tokens": 8} | limits
        config = PageBrainConfig.for_model(self.model, async_scheduling=async_scheduling, **settings)
        self.scores: dict[int, list[int]] = {}
        self.engine = chapter.Engine(self.model, config, lambda number, scores: self.note(number, scores))
        self.executor = self.engine.executor
        self.seqs: list[Sequence] = []
        self.returned: list[Any] = []

    def note(self, number: int, scores: Tensor) -> None:
        assert scores is not None and scores.numel() == 1, f"the scores of sequence {number} are {scores}"
        self.scores.setdefault(number, []).append(int(scores))

    def add(self, prompt: list[int], count: int) -> Sequence:
        self.seqs.append(self.engine.add_request(prompt, count))
        return self.seqs[-1]

    def run(self, steps: int = 500) -> None:
        """Step until the engine says that all is done."""
        for _ in range(steps):
            past = len(self.executor.log)
            had_ended = {seq.seq_id for seq in self.seqs if seq.is_finished}
            lengths = {seq.seq_id: len(seq.token_ids) for seq in self.seqs}
            group = self.engine.step()
            self.returned.append(group)
            fresh = [number for kind, number in self.executor.log[past:] if kind == "wait"]
            assert len(fresh) <= 1, f"one call of step read the steps {fresh}: at most one at a time. {self.log}"
            for number in fresh:
                self.check_given(number, had_ended, lengths)
            self.check_counts()
            if group is None:
                self.check_done(fresh, [number for kind, number in self.executor.log[past:] if kind == "launch"])
                return
            assert isinstance(group, SequenceGroup), f"step returned {group!r}, not a SequenceGroup. {self.log}"
            if not fresh:
                assert len(group) == 0, f"step read nothing, so the group that it returns should be empty. {self.log}"
            for number in fresh:
                must = [entry.seq.seq_id for entry in self.executor.groups[number] if entry.seq.seq_id not in had_ended]
                got = [entry.seq.seq_id for entry in group]
                assert sorted(got) == sorted(must), (
                    f"when step {number} was read, the group that was returned should have the sequences {must}, but has "
                    f"{got}: it is the step's group without the sequences that had ended before, "
                    f"{sorted(had_ended)}. Chunks that "
                    f"sample nothing and preempted sequences belong to it. {self.log}"
                )
                lost = [[seq.seq_id for seq in each.preempted] for each in (self.executor.groups[number], group)]
                with hint("SequenceGroup(entries, preempted): the group that is returned keeps `preempted` of step.group."):
                    assert lost[0] == lost[1], (
                        f"`preempted` of the group that was returned should be {lost[0]}, as in step {number}'s "
                        f"group, but is "
                        f"{lost[1]}. {self.log}"
                    )
        raise AssertionError(f"step did not return None in {steps} calls. {self.log}")

    @property
    def log(self) -> str:
        text = ", ".join(f"{kind} {number}" for kind, number in self.executor.log[-12:])
        return f"What was launched and waited for, at last: {text or 'nothing'}"

    def check_done(self, fresh: list[int], launched: list[int]) -> None:
        """``step`` returned ``None``: it must have launched and read nothing, and nothing may be in flight."""
        said = "step returned None, which says that all is done, but"
        assert not fresh, f"{said} it had just read step {fresh[0]}: return what read returned. {self.log}"
        assert not launched, (
            f"{said} it had just launched step {launched[0]}. If nothing was read, return an empty group, "
            f"SequenceGroup(()). {self.log}"
        )
        flying = self.executor.in_flight
        assert not flying, f"{said} steps {flying} were not waited for: if nothing can be planned, read. {self.log}"

    def check_given(self, number: int, had_ended: set[int], lengths: dict[int, int]) -> None:
        """Right after a step was read: each sequence in it has one token more, or none."""
        waiting = [seq.seq_id for seq in self.engine.scheduler.waiting]
        for entry in self.executor.groups[number]:
            seq_id, now = entry.seq.seq_id, len(entry.seq.token_ids)
            gets = int(entry.samples and seq_id not in had_ended)
            must = lengths[seq_id] + gets
            if seq_id in had_ended:
                why = "it had ended before, and what the step sampled is past the end"
            elif not entry.samples:
                why = "this was a chunk of its prompt that samples nothing"
            else:
                meanwhile = "it was preempted while the step was in flight, and " if seq_id in waiting else ""
                why = f"{meanwhile}it gets the token that the step sampled, and keeps it"
            assert now == must, (
                f"right after step {number} was read, sequence {seq_id} should have {must} tokens (before, it had "
                f"{lengths[seq_id]}) but has {now}: {why}. {self.log}"
            )
            token, own = entry.seq.token_ids[-1], self.executor.texts[seq_id][entry.context_len]
            assert not gets or token == own, (
                f"step {number} sampled token {own} for sequence {seq_id}, but {token} was given to it: tokens[i] is that "
                f"of step.sampling[i], and step.sampling is not in the order of step.group. {self.log}"
            )

    def check_counts(self) -> None:
        """Every sequence counts as unread what is in flight, and no more."""
        flying = [entry for number in self.executor.in_flight for entry in self.executor.groups[number]]
        for seq in self.seqs:
            own = [entry for entry in flying if entry.seq is seq]
            for name, got, must in (
                ("num_unread_steps", seq.num_unread_steps, len(own)),
                ("num_unread_tokens", seq.num_unread_tokens, sum(entry.samples for entry in own)),
            ):
                with hint("For each entry of step.group: num_unread_steps -= 1, and num_unread_tokens -= entry.samples."):
                    assert got == must, (
                        f"`{name}` of sequence {seq.seq_id} should be {must} but is {got}: launch adds to it "
                        f"and apply takes "
                        f"it back, once for each entry of step.group. {self.log}"
                    )

    def expected(self, seq: Sequence) -> list[int]:
        """What a correct loop gives."""
        text = list(seq.request.prompt_token_ids)
        while len(text) < seq.max_num_tokens:
            text.append(next_token(text) % 97)
            if text[-1] == self.model.config.eos_token_id:
                break
        return text[seq.num_prompt_tokens :]

    def check_answers(self) -> None:
        for seq in self.seqs:
            what = f"the answer of sequence {seq.seq_id}"
            assert_same_tokens(seq.output_token_ids, self.expected(seq), what=what)
            assert seq.is_finished, f"sequence {seq.seq_id} has all its tokens, but is not finished"
            scores = f"the list of scores that on_logits got of sequence {seq.seq_id}, each known by its token,"
            with hint("step.logits[i] belongs to step.sampling[i]. Pass it to `give` with tokens[i]."):
                assert_same_tokens(self.scores.get(seq.seq_id, []), self.expected(seq), what=scores)
            entries = [entry for group in self.returned if group is not None for entry in group if entry.seq is seq]
            times, tokens = sum(entry.samples for entry in entries), len(seq.output_token_ids)
            assert times == tokens, (
                f"sequence {seq.seq_id}, preempted {seq.num_preemptions} times, has {tokens} tokens, but the groups that "
                f"were returned say that it got one {times} times"
            )
        free, blocks = self.engine.cache.num_free_blocks, self.engine.config.num_blocks - 1
        assert free == blocks, f"all sequences have ended, but {blocks - free} blocks are still held"


def check_order(got: list[tuple[str, int]], expected: list[tuple[str, int]]) -> None:
    """Fail with the first event that is not as expected, and with what stands before and behind it."""
    mine, theirs = ([f"{kind} {number}" for kind, number in events] for events in (got, expected))
    for place, (now, must) in enumerate(zip_longest(mine, theirs)):
        before = f"after {', '.join(theirs[max(0, place - 3) : place])}" if place else "at first"
        assert now == must, (
            f"the order of launches and waits departs at event {place}: {before} should come "
            f"{', '.join(theirs[place : place + 3]) or 'nothing more'}, but what came is "
            f"{', '.join(mine[place : place + 3]) or 'nothing more'}"
        )


def collect(self: Any) -> None:
    """``LateRetirement.collect``, as task 7.5 asks for it."""
    for seq_id in [seq_id for seq_id, seq in self.pending.items() if not seq.num_unread_steps]:
        self.pending.pop(seq_id)
        self.cache.free(seq_id)
        self.rows.release(seq_id)


def make_room(self: Any, seq: Sequence, num_tokens: int) -> bool:
    """``Scheduler.make_room``, as task 7.5 asks for it."""
    while True:
        if self.cache_manager.can_grow(seq.seq_id, num_tokens):
            return True
        if self.retirement.num_blocks:
            return False
        victim = self.running[-1]
        del self.running[-1]
        victim.preempt()
        self.preempted.append(victim)
        self.waiting.insert(0, victim)
        self.retirement.retire(victim)
        if victim is seq:
            return False


@pytest.mark.task(
    "7.4",
    hint="step: at depth 0 each step is read as soon as it was launched, and what read returned is returned. apply: take "
    "back the counts of all of the group, give by the order of step.sampling, pass step.logits on.",
)
def test_at_depth_0_each_step_is_read_before_the_next_is_launched(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling=False)
    loop.add([1, 2, 3], 4)
    loop.run()
    order = [(kind, number) for number in range(4) for kind in ("launch", "wait")]
    check_order(loop.executor.log, order)
    loop.check_answers()


@pytest.mark.task(
    "7.4",
    hint="Launch first. Then, if two are in flight or nothing could be planned, read the oldest (popleft) and return what "
    "read returned. If nothing was read, return an empty group; if nothing is in flight either, return None.",
)
def test_at_depth_1_a_step_is_launched_before_the_last_one_is_read(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling=True)
    loop.add([1, 2, 3], 4)
    loop.run()
    order = [("launch", 0)] + [event for number in range(1, 4) for event in (("launch", number), ("wait", number - 1))]
    order.append(("wait", 3))
    check_order(loop.executor.log, order)
    lengths = [None if group is None else len(group) for group in loop.returned]
    assert lengths == [0, 1, 1, 1, 1, None], (
        f"step should return an empty group, then four of one entry, then None; it returned groups of {lengths} entries"
    )
    loop.check_answers()


@pytest.mark.task(
    "7.4",
    hint="For every entry of step.group: one unread step less, and one unread token less if it samples. Chunks "
    "are returned, "
    "too. Tokens and logits are in the order of step.sampling.",
)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_chunks_and_decodes_side_by_side(chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling)
    loop.add([1, 2, 3], 9)
    loop.add(list(range(20)), 5)
    loop.add([7] * 11, 1)
    loop.run()
    loop.check_answers()
    assert any(len({entry.phase for entry in group}) == 2 for group in loop.executor.groups)


@pytest.mark.task(
    "7.4",
    hint="Tokens and logits are those of step.sampling, in its order, which is not that of the group. A "
    "sequence that had ended "
    "gets nothing.",
)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_each_sequence_gets_its_own_token_and_scores(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling, max_num_batched_tokens=64)
    for number in range(4):
        loop.add([number, number + 1], 4 + number)
    loop.run()
    loop.check_answers()


def with_an_end(chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool, seed: int) -> Loop:
    """Four sequences, of which the model's end token ends one in the middle while the others go on."""
    loop = Loop(chapter, monkeypatch, async_scheduling, max_num_batched_tokens=64)
    choose = random.Random(seed)
    for _ in range(50):
        prompts = [[choose.randrange(97) for _ in range(3)] for _ in range(4)]
        answers = [[token % 97 for token in hashed(prompt, 12)] for prompt in prompts]
        ends = [token for place, token in enumerate(answers[1]) if place in (3, 4, 5, 6) and token not in answers[1][:place]]
        others = {token for number in (0, 2, 3) for token in answers[number]}
        if ends and ends[0] not in others:
            loop.model.config.eos_token_id = ends[0]
            break
    else:
        raise AssertionError("no such texts were found")
    for prompt in prompts:
        loop.add(prompt, 12)
    return loop


def hashed(prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(next_token(text) % 97)
    return text[len(prompt) :]


@pytest.mark.task(
    "7.4",
    hint="A token past the end is discarded: ask whether the sequence has ended before you give. Counts go down "
    "all the same.",
)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_a_token_past_the_end_is_discarded(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, seed: int, async_scheduling: bool
) -> None:
    loop = with_an_end(chapter, monkeypatch, async_scheduling, seed)
    loop.run()
    answers = [(seq.seq_id, seq.output_token_ids) for seq in loop.seqs]
    for seq_id, answer in answers:
        assert_same_tokens(answer, loop.expected(loop.seqs[seq_id]), what=f"the answer of sequence {seq_id}")
    assert len(loop.seqs[1].output_token_ids) < 12
    last = max(number for number, group in enumerate(loop.executor.groups) if loop.seqs[1] in [e.seq for e in group])
    assert last == len(loop.seqs[1].output_token_ids) - (0 if async_scheduling else 1), "no step was in flight when it ended"


@pytest.mark.task(
    "7.4",
    hint="The group that is returned has the entries whose sequence had not ended: ask before you give out "
    "tokens. Chunks belong to it.",
)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_returned_are_those_who_got_something(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, seed: int, async_scheduling: bool
) -> None:
    loop = with_an_end(chapter, monkeypatch, async_scheduling, seed)
    loop.run()
    loop.check_answers()


@pytest.mark.task("7.4", hint="A preempted sequence is not finished: give it its token, and return it with the others.")
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_who_was_preempted_in_flight_keeps_the_token(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling, num_blocks=9)
    for number in range(4):
        loop.add([number + 1] * (3 + number), 12)
    loop.run()
    loop.check_answers()
    assert sum(seq.num_preemptions for seq in loop.seqs) > 0, "blocks ran out, but no sequence was preempted"


@pytest.mark.task(
    "7.4",
    hint="While a step is in flight the work is not finished, even if nothing can be planned: read the oldest, "
    "one in each call, "
    "and return what read returned.",
)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_the_last_step_is_read_and_waiting_requests_are_served(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    loop = Loop(chapter, monkeypatch, async_scheduling, max_num_seqs=1)
    for number in range(3):
        loop.add([number, 5, 6], 2)
    loop.run()
    assert not loop.executor.in_flight, f"step returned None, but these steps were not waited for: {loop.executor.in_flight}"
    loop.check_answers()
    assert loop.engine.step() is None
    loop.add([9, 9], 3)  # requests that come later are served, too
    loop.run()
    loop.check_answers()


@pytest.mark.task("7.4", hint="Without on_logits there are no logits, and step.logits is None.")
def test_without_logits_nobody_is_told_any(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(chapter, monkeypatch, True)
    engine = chapter.Engine(loop.model, PageBrainConfig.for_model(loop.model, num_blocks=8, async_scheduling=True))
    seq = engine.add_request([1, 2, 3], 4)
    for _ in range(20):
        if engine.step() is None:
            break
    assert_same_tokens(seq.output_token_ids, loop.expected(seq), what="the answer")


# Task 7.5 -----------------------------------------------------------------------------------------------------------------


class Late:
    """Sequences that hold blocks of four slots; some of them are in a step in flight. Retirement is the chapter's."""

    def __init__(self, chapter: Any, held: list[int], in_flight: Iterable[int] = (), free_blocks: int = 0) -> None:
        shape: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
        num_blocks = max(1, sum(held) + free_blocks)
        limits: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
        limits["max_model_len"] = min(64, 4 * num_blocks)
        self.config = PageBrainConfig(block_size=4, num_blocks=num_blocks, **limits, **shape)
        self.cache = ch04_scheduler.FreeAtOnce(ch02_block_table.BlockManager(self.config), self.config)
        self.released: list[int] = []
        self.rows = chapter.BatchRows(self.config, 0)
        self.rows.release = self.released.append
        self.retirement = chapter.LateRetirement(self.cache, self.rows)
        self.scheduler = chapter.Scheduler(self.config, self.cache, self.retirement)
        self.seqs = [make_sequence(number, 4 * count + 1) for number, count in enumerate(held)]
        for seq, count in zip(self.seqs, held, strict=True):
            self.cache.grow(seq.seq_id, 4 * count)
            seq.num_scheduled = seq.num_computed = 4 * count
            seq.status = SequenceStatus.RUNNING
            seq.num_unread_steps = int(seq.seq_id in in_flight)
        self.scheduler.running = list(self.seqs)
        self.story = f"blocks held by each sequence: {held}, free: {free_blocks}; in flight: {list(in_flight)}"

    def retire(self, *numbers: int) -> None:
        for number in numbers:
            self.story += f"; retire({number})"
            self.retirement.retire(self.seqs[number])

    def read(self, *numbers: int) -> None:
        """A step with these was read."""
        for number in numbers:
            self.seqs[number].num_unread_steps -= 1
        self.story += f"; a step with {list(numbers)} was read, and collect() called"
        self.retirement.collect()

    def check(self, pending: list[int], gone: list[int]) -> None:
        """Which sequences still hold blocks and row, and which do not."""
        for seq in self.seqs:
            number = seq.seq_id
            holds = len(self.cache.block_table(number)) > 0
            assert holds == (number not in gone), (
                f"the blocks of sequence {number} should {'be free' if number in gone else 'still be held'}, but are not. "
                f"{self.story}"
            )
        assert sorted(self.released) == sorted(gone), (
            f"the rows of {gone} should have been released, each once; released were {self.released}. {self.story}"
        )
        got = sorted(self.retirement.pending)
        assert got == sorted(pending), f"pending should be {pending} but is {got}. {self.story}"


@pytest.mark.task(
    "7.5",
    hint="A sequence in no step in flight has num_unread_steps 0: free its blocks, release its row, and take it "
    "out of pending.",
)
def test_who_is_in_no_step_in_flight_gives_all_back_at_once(chapter: Any) -> None:
    late = Late(chapter, [2, 3, 1])
    late.retire(1)
    late.check(pending=[], gone=[1])
    late.retire(0)
    late.check(pending=[], gone=[0, 1])


@pytest.mark.task("7.5", hint="A step in flight still reads and writes these blocks. They are free when it has been read.")
def test_who_is_in_a_step_in_flight_keeps_all_until_it_was_read(chapter: Any) -> None:
    late = Late(chapter, [2, 3, 1], in_flight=[1])
    late.retire(1)
    late.check(pending=[1], gone=[])
    late.retire(2)
    late.check(pending=[1], gone=[2])
    late.read(1)
    late.check(pending=[], gone=[1, 2])
    late.read()
    late.check(pending=[], gone=[1, 2])


@pytest.mark.task(
    "7.5", hint="A prompt's chunk samples nothing, and its step reads blocks all the same: count steps, not tokens."
)
def test_steps_count_and_not_tokens(chapter: Any) -> None:
    late = Late(chapter, [2, 1])
    late.seqs[0].num_unread_steps = 2
    late.seqs[1].num_unread_tokens = 1
    late.retire(0, 1)
    late.check(pending=[0], gone=[1])
    late.read(0)
    late.check(pending=[0], gone=[1])
    late.read(0)
    late.check(pending=[], gone=[0, 1])


@pytest.mark.task(
    "7.5", hint="Look at all of pending. A dictionary may not change while it is looped over: make a list first, then free."
)
def test_any_of_the_pending_can_be_free_first(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(20):
        held = [choose.randint(1, 3) for _ in range(6)]
        late = Late(chapter, held, in_flight=range(6))
        order = choose.sample(range(6), 6)
        late.retire(*order)
        late.check(pending=order, gone=[])
        left = choose.sample(range(6), 6)
        while left:
            now = [left.pop() for _ in range(choose.randint(1, len(left)))]
            late.read(*now)
            late.check(pending=left, gone=[number for number in range(6) if number not in left])


class Coming:
    """A retirement that works, with all that ``LateRetirement`` declares: blocks of a sequence in flight come later."""

    def __init__(self, late: Late) -> None:
        self.cache = late.cache
        self.rows = late.rows
        self.pending: dict[int, Sequence] = {}
        self.retired: list[int] = []

    @property
    def num_blocks(self) -> int:
        return sum(len(self.cache.block_table(number)) for number in self.pending)

    def retire(self, seq: Sequence) -> None:
        self.retired.append(seq.seq_id)
        self.pending[seq.seq_id] = seq
        self.collect()

    def collect(self) -> None:
        for seq_id in [number for number, seq in self.pending.items() if not seq.num_unread_steps]:
            del self.pending[seq_id]
            self.cache.free(seq_id)
            self.rows.release(seq_id)


class Crowd(Late):
    """The same, for ``make_room``, with a retirement that works. ``pending`` have ended and still hold blocks."""

    def __init__(
        self, chapter: Any, held: list[int], in_flight: Iterable[int] = (), free_blocks: int = 0, pending: Iterable[int] = ()
    ) -> None:
        in_flight, pending = list(in_flight), list(pending)
        super().__init__(chapter, held, [*in_flight, *pending], free_blocks)
        self.coming = Coming(self)
        self.scheduler.retirement = self.retirement = self.coming
        for number in pending:
            self.coming.retire(self.seqs[number])
            self.scheduler.running.remove(self.seqs[number])
        self.waiting = make_sequence(70, 3)
        self.scheduler.waiting.append(self.waiting)
        self.story += f"; ended, and their blocks on the way back: {pending}; sequence 70 is in the waiting queue"

    def check_room(self, number: int, answer: bool, preempted: list[int], count: int = 1) -> None:
        """``make_room`` for ``count`` more blocks; ``preempted`` in order of arrival."""
        running = [seq.seq_id for seq in self.scheduler.running if seq.seq_id not in preempted]
        tables = {seq.seq_id: self.cache.block_table(seq.seq_id) for seq in self.seqs}
        num_tokens = self.seqs[number].num_scheduled + 4 * count
        self.story += f"; sequence {number} wants {count} block(s) more"
        got = self.scheduler.make_room(self.seqs[number], num_tokens)
        passed_by = [seq.seq_id for seq in self.scheduler.preempted if seq.seq_id not in self.coming.retired]
        if not passed_by:
            self.check_result(bool(got), answer, preempted, running, tables, number)
            return
        self.story += f"; preempted, but never given to `self.retirement.retire`: {passed_by}"
        with hint("A victim goes to `self.retirement.retire`, which frees its blocks when no step in flight uses them."):
            self.check_result(bool(got), answer, preempted, running, tables, number)

    def check_result(
        self,
        got: bool,
        answer: bool,
        preempted: list[int],
        running: list[int],
        tables: dict[int, tuple[int, ...]],
        number: int,
    ) -> None:
        """What ``make_room`` returned for sequence ``number``, and what it left; ``tables`` are those of before."""
        for what, now, must in (
            ("the list of preempted sequences", sorted(seq.seq_id for seq in self.scheduler.preempted), preempted),
            ("running", [seq.seq_id for seq in self.scheduler.running], running),
            ("waiting", [seq.seq_id for seq in self.scheduler.waiting], [*preempted, 70]),
            ("what make_room returns", got, answer),
            (
                "calls of preempt(), {sequence: calls},",
                {s.seq_id: s.num_preemptions for s in self.seqs if s.num_preemptions},
                dict.fromkeys(preempted, 1),
            ),
        ):
            assert now == must, f"{what} should be {must} but is {now}. {self.story}"
        for seq in self.seqs:
            kept = seq.seq_id not in preempted or seq.num_unread_steps
            if kept:
                same = self.cache.block_table(seq.seq_id) == tables[seq.seq_id]
                assert same, f"the blocks of sequence {seq.seq_id} changed. {self.story}"
            elif number != seq.seq_id:
                assert not self.cache.block_table(seq.seq_id), f"{seq.seq_id} was preempted but not retired. {self.story}"
            if seq.seq_id in preempted and seq.num_unread_steps:
                assert seq.seq_id in self.coming.pending, f"{seq.seq_id} was preempted but not retired. {self.story}"


@pytest.mark.task("7.5", hint="Ask the cache first (can_grow). If there is room, blocks on their way back do not matter.")
def test_who_has_room_gets_it_whatever_is_coming(chapter: Any) -> None:
    Crowd(chapter, [2, 2, 1], free_blocks=1).check_room(0, True, [])
    Crowd(chapter, [2, 2, 1], free_blocks=1, pending=[1]).check_room(0, True, [])
    Crowd(chapter, [2, 2, 1], free_blocks=1, pending=[1], in_flight=[0, 2]).check_room(2, True, [])


@pytest.mark.task(
    "7.5", hint="While retirement.num_blocks is not 0, blocks are coming: return False and leave all as it is."
)
def test_nobody_is_preempted_while_blocks_are_on_their_way_back(chapter: Any) -> None:
    Crowd(chapter, [2, 2, 1], pending=[1], in_flight=[0, 2]).check_room(0, False, [])
    Crowd(chapter, [2, 2, 1], pending=[1]).check_room(2, False, [])
    Crowd(chapter, [2, 2, 1], pending=[1]).check_room(0, False, [], count=3)


@pytest.mark.task("7.5", hint="Nothing is coming: as in chapter 04, the latest arrival is preempted, until there is room.")
def test_at_depth_0_it_is_what_chapter_04_does(chapter: Any) -> None:
    Crowd(chapter, [2, 2, 1]).check_room(0, True, [2])
    Crowd(chapter, [2, 2, 1]).check_room(0, True, [1, 2], count=2)
    Crowd(chapter, [2, 2, 1]).check_room(2, False, [2])
    Crowd(chapter, [2, 2, 1]).check_room(1, False, [1, 2], count=4)


@pytest.mark.task(
    "7.5", hint="A victim that is in flight gives its blocks late. Then they are coming: preempt no other sequence."
)
def test_one_victim_in_flight_is_enough_for_now(chapter: Any) -> None:
    Crowd(chapter, [2, 2, 1], in_flight=[0, 1, 2]).check_room(0, False, [2])
    Crowd(chapter, [2, 2, 1], in_flight=[0, 1, 2]).check_room(1, False, [2], count=3)
    Crowd(chapter, [2, 2, 1], in_flight=[0, 1, 2]).check_room(2, False, [2])
    Crowd(chapter, [2, 2, 1, 1], in_flight=[2]).check_room(0, False, [2, 3], count=2)


@pytest.mark.task(
    "7.5", hint="Play it on paper: is there room, are blocks coming, which sequence is the latest, and is it in flight?"
)
def test_room_is_made_or_waited_for_in_any_situation(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(60):
        held = [choose.randint(1, 4) for _ in range(choose.randint(2, 6))]
        numbers = range(len(held))
        in_flight = [number for number in numbers if choose.random() < 0.4]
        pending = [number for number in numbers if choose.random() < 0.15][: len(held) - 1]
        running = [number for number in numbers if number not in pending]
        number, count, free = choose.choice(running), choose.randint(1, 4), choose.randint(0, 3)
        preempted: list[int] = []
        coming, room = bool(pending), free
        while room < count and not coming:
            victim = running.pop()
            preempted.insert(0, victim)
            coming = victim in in_flight
            room += 0 if coming else held[victim]
            if victim == number:
                break
        crowd = Crowd(chapter, held, in_flight, free, pending)
        crowd.check_room(number, room >= count and number not in preempted, preempted, count)


# All of it ----------------------------------------------------------------------------------------------------------------


class GuardedCache(ch04_scheduler.FreeAtOnce):
    """Slots hold a large value until they are written."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        poison(self)


@pytest.mark.task(
    "7.5",
    hint="All tasks work together here. Find the first step in engine.history in which the sequence of the "
    "message is wrong.",
)
@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_the_engine_gives_what_hugging_face_gives(
    chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool, use_graphs: bool
) -> None:
    monkeypatch.setattr("chapters.ch04_scheduler.FreeAtOnce", GuardedCache)
    model, prompts = random_gpt2(seed=seed), [[1, 2, 3], [7] * 17, [40, 41, 42], list(range(30)), [95]]
    logits: dict[int, list[Tensor]] = {number: [] for number in range(len(prompts))}
    settings = {"block_size": 4, "num_blocks": 14, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    config = PageBrainConfig.for_model(model, async_scheduling=async_scheduling, **settings)
    engine = chapter.Engine(model, config, lambda number, scores: logits[number].append(scores), use_graphs=use_graphs)
    seqs = [engine.add_request(prompt, 20) for prompt in prompts]
    most = 0
    for _ in range(1000):
        if engine.step() is None:
            break
        most = max(most, len(engine.in_flight))
        for step in engine.in_flight:
            for entry in step.group:
                slots = 4 * len(engine.cache.block_table(entry.seq.seq_id))
                assert slots >= entry.context_len, (
                    f"sequence {entry.seq.seq_id} holds {slots} slots, but a step in flight uses {entry.context_len} of them"
                )
    for number, (prompt, seq) in enumerate(zip(prompts, seqs, strict=True)):
        what = f"the answer to prompt {number}, preempted {seq.num_preemptions} times,"
        assert_same_tokens(seq.output_token_ids, hf_greedy(model, prompt, 20, END), what=what)
        theirs = hf_logits(model, prompt + seq.output_token_ids)[len(prompt) - 1 : -1]
        what = f"the logits of prompt {number}, preempted {seq.num_preemptions} times,"
        assert_same(torch.stack(logits[number]), theirs, what=what, axes=("output token", "score"))
    assert engine.cache.num_free_blocks == 14, f"{14 - engine.cache.num_free_blocks} blocks are still held at the end"
    assert len(engine.executor.rows.free) == 8, f"{8 - len(engine.executor.rows.free)} batch rows are still held at the end"
    assert sum(seq.num_preemptions for seq in seqs) > 0, "blocks ran out, but no sequence was preempted"
    assert any({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in engine.history)
    assert most == int(async_scheduling), (
        f"{most} steps were in flight between two calls of step, expected {int(async_scheduling)}"
    )


@pytest.mark.task("7.5", hint="Many small loads with few blocks, at both depths. Each slot has an influence on the text.")
def test_random_loads_are_served_exactly(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    model = random_gpt2(seed=seed, n_layer=1, n_embd=24, n_head=2)
    num_preempted = 0
    some_token = hf_greedy(model, [1, 2, 3], 4)[-1]
    for load in range(8):
        model.config.eos_token_id = end = some_token if load > 3 else None  # with it, answers are short and blocks last
        block_size, seats = choose.choice([1, 2, 4]), choose.randint(2, 4)
        limits = {"block_size": block_size, "num_blocks": 20 // block_size}
        limits["max_num_batched_tokens"] = choose.randint(seats, 9)
        config = PageBrainConfig.for_model(model, max_num_seqs=seats, async_scheduling=load % 4 != 0, **limits)
        engine = chapter.Engine(model, config)
        seqs = []
        for _ in range(7):
            prompt = [choose.randrange(96) for _ in range(choose.randint(1, 9))]
            seqs.append(engine.add_request(prompt, choose.randint(1, 11)))
            for _ in range(choose.randint(0, 3)):
                engine.step()
        for _ in range(1000):
            if engine.step() is None:
                break
        else:
            raise AssertionError(f"load {load} is not done after 1000 steps")
        for seq in seqs:
            prompt, count = list(seq.request.prompt_token_ids), seq.max_num_tokens - seq.num_prompt_tokens
            what = f"load {load}: the answer to request {seq.seq_id}"
            assert_same_tokens(seq.output_token_ids, hf_greedy(model, prompt, count, end), what=what)
        num_preempted += sum(seq.num_preemptions for seq in seqs)
        assert engine.cache.num_free_blocks == 20 // block_size, f"load {load}: blocks are still held at the end"
    assert num_preempted > 0, "blocks ran out in these loads, but no sequence was preempted"


# Task 7.6 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.task(
    "7.6", hint="A gap goes from the end of a step's last kernel to the beginning of the next step's first one."
)
def test_the_gap_that_the_host_makes(chapter: Any, record_property: Any) -> None:
    report = json.loads((ROOT / "docs/performance/timeline.json").read_text(encoding="utf-8"))
    gaps: dict[str, list[float]] = {}
    for run in report["runs"]:
        if run["batch"] == 1:
            kernels, starts = run["timeline"]["gpu"], run["timeline"]["step_starts_us"][1:]
            around = [
                (at, max(e for b, e in kernels if b < at), min((b for b, _ in kernels if b >= at), default=0))
                for at in starts
            ]
            gaps[run["way"]] = [after - before for _, before, after in around if after]
            if run["way"] == "graph":
                delays = [after - at for at, _, after in around if after]
    expected = statistics.median(gaps["graph"])
    told = (
        "For each step start but the first: the first kernel that begins after it, minus the end of the last one before it."
    )
    looks_like = {
        "That looks like milliseconds. The unit is microseconds.": (expected / 1000,),
        "That is the gap of the eager steps. Take the run whose way is 'graph'.": (statistics.median(gaps["eager"]),),
        "That is the time from the start of a step to its first kernel. The GPU is idle sooner: from the end of the last "
        "kernel that began before it.": (statistics.median(delays), statistics.mean(delays)),
        "That is the mean of the gaps. Take their median: a single gap may be an accident.": (
            statistics.mean(gaps["graph"]),
        ),
        "That is the longest or the shortest of these gaps. Take their median: a single one may be an accident.": (
            max(gaps["graph"]),
            min(gaps["graph"]),
        ),
    }
    hints = {"high": f"The number is too large. {told}", "low": f"The number is too small. {told}"}
    assert_answer(chapter.answer_7_6, expected, 0.005 * expected, record_property, hints, looks_like)
