"""Chapter 05: notes are read between steps, tokens reach their clients, nobody waits for ever, no blocks stay behind."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from random import Random
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from chapters import ch04_scheduler
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence, SequenceGroup, SequenceStatus
from tests.support.departures import assert_same_tokens
from tests.support.models import hf_greedy, random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

CHAPTER = "05"
PATIENCE_S = 10.0
"""How long a test waits for what must come. Reached only when it never comes."""


def make_engine(num_blocks: int = 32, **shape: Any) -> ch04_scheduler.Engine:
    base = random_gpt2(seed=5, **shape)
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=16)
    return ch04_scheduler.Engine(base, config)


def drain(queue: "asyncio.Queue[Any]") -> list[Any]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def arrive(chapter: ModuleType, shared: Any, prompt: list[int], max_new_tokens: int = 5) -> Any:
    client = chapter.Client(prompt, max_new_tokens)
    shared.arrived.append(client)
    return client


async def within(awaitable: Awaitable[Any], what: str, loop: "asyncio.Task[None] | None" = None) -> Any:
    """What ``awaitable`` gives; a failure that says ``what`` went wrong if it does not come.

    ``loop`` is the learner's, at work meanwhile. What ends it too early is raised here, and not lost.
    """
    task = asyncio.ensure_future(awaitable)
    both: list[asyncio.Future[Any]] = [task] if loop is None else [task, loop]
    await asyncio.wait(both, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        if loop is not None and loop.done():
            loop.result()
            raise AssertionError(f"{what}: run returned, and it must go on until it is cancelled")
        raise AssertionError(f"{what} (waited for {PATIENCE_S:.0f} s)")
    return task.result()


async def until(condition: Callable[[], Any]) -> None:
    """Return when ``condition`` holds."""
    while not condition():
        await asyncio.sleep(0.001)


# 5.1 -------------------------------------------------------------------------------------------------------------------

NOTES = (
    "Walk through arrived first, then through left. Which clients have a sequence, and which sequences still hold blocks?"
)


@pytest.mark.task("5.1", hint=NOTES)
def test_arrivals_become_requests_in_order(chapter: ModuleType, seed: int) -> None:
    draw = Random(seed)
    shared = chapter.AsyncEngine(make_engine())
    prompts = [draw.choices(range(96), k=draw.randint(1, 6)) for _ in range(3)]
    counts = draw.sample(range(1, 20), k=3)
    clients = [arrive(chapter, shared, prompt, count) for prompt, count in zip(prompts, counts)]
    shared.read_notes()
    waiting = list(shared.engine.scheduler.waiting)
    assert all(client.seq is not None for client in clients), "client.seq must be the sequence that add_request returned"
    assert [client.seq for client in clients] == waiting, (
        "the engine's queue must hold the clients' sequences, first come first"
    )
    assert [seq.token_ids for seq in waiting] == prompts, "a prompt went to the wrong client"
    limits = [len(prompt) + count for prompt, count in zip(prompts, counts)]
    assert [seq.max_num_tokens for seq in waiting] == limits, "max_new_tokens went to the wrong client"
    assert shared.clients == {client.seq.seq_id: client for client in clients}, (
        "clients must hold each one by its sequence id"
    )
    assert not shared.arrived and not shared.left, "the notes must be gone once they were acted on"


@pytest.mark.task("5.1", hint=NOTES)
def test_notes_are_acted_on_once(chapter: ModuleType) -> None:
    shared = chapter.AsyncEngine(make_engine())
    arrive(chapter, shared, [1])
    shared.read_notes()
    assert not shared.arrived, "the notes in arrived must be gone once they were acted on"
    shared.read_notes()
    count = len(shared.engine.scheduler.waiting)
    assert count == 1, f"one client arrived and the notes were read twice: expected 1 request in the engine, got {count}"


@pytest.mark.task("5.1", hint="A note that is thrown away before it was acted on is lost if acting on it fails.")
def test_nobody_is_forgotten_if_the_engine_refuses_somebody(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = chapter.AsyncEngine(make_engine())
    clients = [arrive(chapter, shared, [number]) for number in range(3)]
    add_request = shared.engine.add_request

    def refuse_the_second(prompt: list[int], max_new_tokens: int) -> Sequence:
        if prompt == [1]:
            raise RuntimeError("no room in the queue")
        seq: Sequence = add_request(prompt, max_new_tokens)
        return seq

    monkeypatch.setattr(shared.engine, "add_request", refuse_the_second)
    with suppress(RuntimeError):
        shared.read_notes()
    known = [*shared.clients.values(), *shared.arrived]
    lost = [number for number, client in enumerate(clients) if client not in known]
    assert not lost, (
        f"add_request raised for client 1 of 0, 1, 2: clients {lost} are neither in clients nor in arrived any more, so "
        "run cannot tell them that the engine has failed"
    )


@pytest.mark.task("5.1", hint="A client that left is nobody's any more: end its sequence, so that its blocks come back.")
@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "after its prompt", "in mid-sentence"])
def test_who_left_is_served_no_more_and_others_are(chapter: ModuleType, num_steps: int, seed: int) -> None:
    draw = Random(seed)
    shared = chapter.AsyncEngine(make_engine())
    shared.engine.model.config.eos_token_id = None
    stays, leaves = (arrive(chapter, shared, draw.choices(range(96), k=draw.randint(1, 6))) for _ in range(2))
    shared.read_notes()
    for _ in range(num_steps):
        shared.engine.step()
    shared.left.append(leaves)
    shared.read_notes()
    assert leaves.seq.is_finished, "the sequence of a client that left must be ended"
    held = shared.engine.cache.block_table(leaves.seq.seq_id)
    assert not held, f"the client left, but its sequence {leaves.seq.seq_id} still holds blocks {list(held)}"
    assert shared.clients == {stays.seq.seq_id: stays}, "clients must hold the one who stays and nobody else"
    for _ in range(20):
        group = shared.engine.step()
        if group is None:
            break
        assert all(entry.seq is stays.seq for entry in group), "a step computed the sequence of a client that had left"
    assert len(stays.seq.output_token_ids) == 5, "the client that stayed did not get all its tokens"


@pytest.mark.task("5.1", hint="Both notes of such a client are there at once. Read the arrivals first.")
def test_who_came_and_left_between_two_steps_leaves_nothing_behind(chapter: ModuleType) -> None:
    shared = chapter.AsyncEngine(make_engine())
    client = arrive(chapter, shared, [1, 2, 3])
    shared.left.append(client)
    shared.read_notes()
    assert not shared.clients, "a client that came and left must not be served"
    group = shared.engine.step()
    assert group is None, "the engine computed a step for a client that had left already"


@pytest.mark.task("5.1", hint="After the last token the engine has ended the sequence itself, and deliver the client.")
def test_leaving_after_the_last_token_changes_nothing(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = chapter.AsyncEngine(make_engine())
    client = arrive(chapter, shared, [1, 2, 3], 1)
    shared.read_notes()
    shared.engine.step()
    assert client.seq.is_finished
    shared.clients.clear()  # as deliver leaves it
    shared.left.append(client)
    ended: list[Sequence] = []
    monkeypatch.setattr(shared.engine, "finish", ended.append)
    shared.read_notes()
    assert not ended, "Engine.finish was called for a sequence that had finished"
    assert not shared.left, "the note must be gone once it was acted on"


# 5.2 -------------------------------------------------------------------------------------------------------------------


def entry(number: int, output: list[int], *, samples: bool = True, finished: bool = False) -> ScheduledSequence:
    """A sequence's part of a step that has been computed: ``output`` are its tokens so far."""
    request = Request(str(number), None, (7, 8), SamplingParams(temperature=0), number, number, 0.0)
    status = SequenceStatus.FINISHED if finished else SequenceStatus.RUNNING
    seq = Sequence(number, request, 0, 32, token_ids=[7, 8, *output], status=status)
    if not samples:
        return ScheduledSequence(seq, 0, 1, False)
    start = 0 if len(output) == 1 else len(seq.token_ids) - 2
    return ScheduledSequence(seq, start, len(seq.token_ids) - 1 - start, True)


def serve(chapter: ModuleType, *entries: ScheduledSequence) -> tuple[Any, dict[int, Any]]:
    shared = chapter.AsyncEngine(make_engine())
    for part in entries:
        client = chapter.Client([7, 8], 30)
        client.seq = part.seq
        shared.clients[part.seq.seq_id] = client
    return shared, dict(shared.clients)


@pytest.mark.task(
    "5.2", hint="The newest token of the entry's sequence, put_nowait into the queue of the client with that sequence's id."
)
def test_each_client_gets_its_own_newest_token(chapter: ModuleType, seed: int) -> None:
    draw = Random(seed)
    outputs = {number: draw.choices(range(97), k=draw.randint(1, 5)) for number in draw.sample(range(50), k=4)}
    entries = [entry(number, output) for number, output in outputs.items()]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(reversed(entries))))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    expected = {number: output[-1:] for number, output in outputs.items()}
    assert got == expected, f"expected each client's own newest token, {expected}, got {got}"
    assert shared.clients == clients, "clients that are not done must stay"


@pytest.mark.task("5.2", hint="Not every entry brings a token: a long prompt takes several steps. Look at entry.samples.")
def test_a_chunk_with_more_to_come_brings_nothing(chapter: ModuleType) -> None:
    entries = [entry(1, [], samples=False), entry(2, [20])]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(entries)))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    assert got == {1: [], 2: [20]}, f"only sequence 2 sampled, and its token is 20; the queues got {got}"


@pytest.mark.task("5.2", hint="After its last token a client is told that nothing follows, and is served no more.")
def test_the_end_follows_the_last_token(chapter: ModuleType) -> None:
    entries = [entry(1, [10, 11], finished=True), entry(2, [20]), entry(3, [30], finished=True)]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(entries)))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    expected = {1: [11, None], 2: [20], 3: [30, None]}
    assert got == expected, f"sequences 1 and 3 have finished, 2 has not: the queues must get {expected}, got {got}"
    assert set(shared.clients) == {2}, f"only client 2 is still being served, but clients holds {sorted(shared.clients)}"


@pytest.mark.task("5.2", hint="Only those who were part of the step have anything to get.")
def test_who_was_not_in_the_step_gets_nothing(chapter: ModuleType) -> None:
    computed, absent = entry(1, [10]), entry(2, [20, 21])
    shared, clients = serve(chapter, computed, absent)
    shared.deliver(SequenceGroup((computed,)))
    got = drain(clients[2].tokens)
    assert got == [], f"sequence 2 was not in the step, but its client got {got}"


# 5.3 -------------------------------------------------------------------------------------------------------------------


class Script:
    """An engine whose step is a function of the test's; it notes in which thread it ran."""

    def __init__(self, step: Callable[[], SequenceGroup | None]) -> None:
        self._step = step
        self.threads: list[int] = []

    def step(self) -> SequenceGroup | None:
        self.threads.append(threading.get_ident())
        return self._step()


def scripted(chapter: ModuleType, step: Callable[[], SequenceGroup | None]) -> tuple[Any, list[str]]:
    """The learner's loop around a scripted engine, and a log of what it did in which order."""
    log: list[str] = []
    here = threading.get_ident()

    class Logged(chapter.AsyncEngine):  # type: ignore[misc, name-defined]
        def read_notes(self) -> None:
            log.append("read" if threading.get_ident() == here else "read in another thread")
            self.arrived.clear()
            self.left.clear()

        def deliver(self, group: SequenceGroup) -> None:
            log.append("deliver" if threading.get_ident() == here else "deliver in another thread")

    def logged() -> SequenceGroup | None:
        log.append("step")
        try:
            return step()
        finally:
            log.append("done")

    shared = Logged(Script(logged))
    shared.note.set()  # there is something to look at
    return shared, log


async def ended(loop: "asyncio.Task[None]") -> BaseException | None:
    """Cancel the loop if it still runs; what it ended with."""
    loop.cancel()
    [result] = await asyncio.gather(loop, return_exceptions=True)
    return result


@pytest.mark.task(
    "5.3", hint="Read the notes, compute, deliver if there is a group, and again. Only the step belongs in a thread."
)
def test_notes_are_read_before_each_step_and_tokens_delivered_after_it(chapter: ModuleType, seed: int) -> None:
    num_steps = Random(seed).randint(2, 6)
    groups = [SequenceGroup((entry(1, [10]),))] * num_steps

    async def scenario() -> None:
        idle = asyncio.Event()
        here = asyncio.get_running_loop()

        def step() -> SequenceGroup | None:
            if groups:
                return groups.pop()
            here.call_soon_threadsafe(idle.set)
            return None

        shared, log = scripted(chapter, step)
        loop = asyncio.create_task(shared.run())
        await within(idle.wait(), "the loop never computed the steps that were there", loop)
        await ended(loop)
        expected = ["read", "step", "done", "deliver"] * num_steps + ["read", "step", "done"]
        assert log[: len(expected)] == expected, f"expected the order {expected}, got {log}"

    asyncio.run(scenario())


@pytest.mark.task("5.3", hint="await asyncio.to_thread(...) lets other coroutines run until the step is done.")
def test_the_network_goes_on_while_a_step_computes(chapter: ModuleType) -> None:
    async def scenario() -> None:
        began, others_ran = threading.Event(), threading.Event()
        waited: list[bool] = []

        def step() -> None:
            began.set()
            waited.append(others_ran.wait(PATIENCE_S / 5))

        async def others() -> None:
            await until(began.is_set)
            others_ran.set()

        shared, _ = scripted(chapter, step)
        loop, network = asyncio.create_task(shared.run()), asyncio.create_task(others())
        await within(network, "no other coroutine could run while a step was under way", loop)
        await within(until(lambda: waited), "the step never ended", loop)
        await ended(loop)
        assert waited[0], "no other coroutine could run while a step was under way: the step blocks the event loop"
        assert threading.get_ident() not in shared.engine.threads, "the step ran in the event loop's own thread"

    asyncio.run(scenario())


@pytest.mark.task("5.3", hint="With nothing to compute, wait for shared.note instead of asking again and again.")
def test_an_idle_loop_sleeps(chapter: ModuleType) -> None:
    async def scenario() -> None:
        shared, log = scripted(chapter, lambda: None)
        loop = asyncio.create_task(shared.run())
        for _ in range(200):
            await asyncio.sleep(0.001)
        if loop.done():
            loop.result()
        assert not loop.done(), "the loop ended when there was nothing to compute; it must wait for the next client"
        await ended(loop)
        steps = log.count("step")
        assert 1 <= steps <= 2, (
            f"with nothing to do and no note, expected the loop to try one step and sleep; it tried {steps}"
        )

    asyncio.run(scenario())


@pytest.mark.task("5.3", hint="When is the event cleared? A note may be left at any moment until the loop sleeps.")
@pytest.mark.parametrize("during_the_step", [True, False], ids=["while the step computes", "while the loop sleeps"])
def test_a_note_wakes_the_loop(chapter: ModuleType, during_the_step: bool) -> None:
    async def scenario() -> None:
        began, noted, second = threading.Event(), threading.Event(), asyncio.Event()
        here = asyncio.get_running_loop()
        calls: list[None] = []

        def step() -> None:
            calls.append(None)
            if len(calls) == 2:
                here.call_soon_threadsafe(second.set)
            if len(calls) == 1 and during_the_step:
                began.set()
                noted.wait(PATIENCE_S / 5)

        shared, log = scripted(chapter, step)
        loop = asyncio.create_task(shared.run())
        computing = began.is_set if during_the_step else lambda: "done" in log
        await within(until(computing), "the loop never computed a step", loop)
        if not during_the_step:
            await asyncio.sleep(0.05)  # the loop has gone to sleep
        arrive(chapter, shared, [1])
        shared.note.set()
        if during_the_step:
            await asyncio.sleep(0.05)
            assert log[-1] == "step", "a note was read while a step was computing: nobody may touch the engine then"
        noted.set()
        moment = "while a step was computing" if during_the_step else "while the loop was asleep"
        await within(second.wait(), f"a note was left {moment}, and the loop never woke up to read it", loop)
        await ended(loop)

    asyncio.run(scenario())


@pytest.mark.task(
    "5.3", hint="Keep the exception, tell everybody, raise it again. Who waits for tokens, and where is it noted?"
)
def test_a_failed_step_reaches_everybody(chapter: ModuleType) -> None:
    failure = RuntimeError("the step failed")

    async def scenario() -> None:
        began, noted = threading.Event(), threading.Event()

        def step() -> None:
            began.set()
            noted.wait(PATIENCE_S / 5)
            raise failure

        shared, _ = scripted(chapter, step)
        served = chapter.Client([1], 5)
        shared.clients[0] = served
        loop = asyncio.create_task(shared.run())
        await within(until(began.is_set), "the loop never computed a step", loop)
        late = arrive(chapter, shared, [2])
        shared.note.set()
        noted.set()
        [result] = await within(asyncio.gather(loop, return_exceptions=True), "the loop went on after a step had failed")
        assert result is failure, f"run must raise what the step raised, got {result!r}"
        assert shared.failure is failure, f"failure must keep what the step raised, got {shared.failure!r}"
        assert drain(served.tokens) == [failure], "a client that was being served was not told that the engine failed"
        assert drain(late.tokens) == [failure], "a client that had just arrived was not told that the engine failed"

    asyncio.run(scenario())


@pytest.mark.task("5.3", hint="Not only a step can raise: everything between two steps belongs to the loop too.")
def test_what_fails_between_steps_reaches_everybody_too(chapter: ModuleType) -> None:
    failure = RuntimeError("the notes could not be read")

    async def scenario() -> None:
        class Fails(chapter.AsyncEngine):  # type: ignore[misc, name-defined]
            def read_notes(self) -> None:
                raise failure

        shared = Fails(Script(lambda: None))
        shared.note.set()
        waits = arrive(chapter, shared, [1])
        loop = asyncio.create_task(shared.run())
        [result] = await within(asyncio.gather(loop, return_exceptions=True), "the loop went on after reading notes failed")
        assert result is failure, f"run must raise what read_notes raised, got {result!r}"
        assert shared.failure is failure, f"failure must keep what read_notes raised, got {shared.failure!r}"
        assert drain(waits.tokens) == [failure], "read_notes raised, and the client that waits was not told"

    asyncio.run(scenario())


@pytest.mark.task("5.3", hint="asyncio.CancelledError is raised where the loop awaits. It is no Exception: let it pass.")
@pytest.mark.parametrize("in_a_step", [False, True], ids=["while the loop sleeps", "while a step computes"])
def test_a_cancelled_loop_ends_and_is_no_failure(chapter: ModuleType, in_a_step: bool) -> None:
    async def scenario() -> None:
        began, go_on = threading.Event(), threading.Event()

        def step() -> None:
            began.set()
            if in_a_step:
                go_on.wait(PATIENCE_S / 5)

        shared, _ = scripted(chapter, step)
        served = chapter.Client([1], 5)
        shared.clients[0] = served
        loop = asyncio.create_task(shared.run())
        await within(until(began.is_set), "the loop never computed a step", loop)
        await asyncio.sleep(0.05)
        if loop.done():
            loop.result()
        loop.cancel()
        await asyncio.wait([loop], timeout=PATIENCE_S)
        go_on.set()
        assert loop.done() and loop.cancelled(), "the loop must end when it is cancelled, and pass the cancellation on"
        assert shared.failure is None, f"being cancelled is no failure, but failure is {shared.failure!r}"
        got = drain(served.tokens)
        assert not got, f"being cancelled is no failure, but a client was told {got}"

    asyncio.run(scenario())


# 5.4 -------------------------------------------------------------------------------------------------------------------


async def begun(shared: Any, prompt: list[int], max_new_tokens: int = 9) -> tuple[Any, "asyncio.Task[int]", Any]:
    """A stream whose first token somebody waits for, and its client."""
    stream = shared.stream(prompt, max_new_tokens)
    first = asyncio.ensure_future(anext(stream))
    for _ in range(5):
        await asyncio.sleep(0)
    if first.done():
        first.result()
    assert len(shared.arrived) == 1, f"a stream that was begun must leave one note in arrived, got {len(shared.arrived)}"
    assert shared.note.is_set(), "a note was left in arrived, but the event was not set: nobody will wake up to read it"
    return stream, first, shared.arrived[0]


def assert_left_once(shared: Any, client: Any, how: str) -> None:
    assert shared.left == [client], f"{how}: expected one note that the client left, got {len(shared.left)}"
    assert shared.note.is_set(), f"{how}: nobody will read the note, for the event was not set"


@pytest.mark.task("5.4", hint="Note that you came; hand on one token after the other until None; note that you left.")
def test_tokens_come_one_by_one_until_the_end(chapter: ModuleType, seed: int) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine())
        stream, first, client = await begun(shared, [1, 2], 9)
        assert (list(client.prompt), client.max_new_tokens) == ([1, 2], 9), "the note must say what was asked for"
        shared.note.clear()
        for token_id in (0, *Random(seed).choices(range(97), k=3), 0):
            client.tokens.put_nowait(token_id)
            try:
                got = await within(first, f"token {token_id} was in the queue and was not handed on")
            except StopAsyncIteration:
                raise AssertionError(f"the stream ended when token {token_id} came: only None is the end") from None
            assert got == token_id, f"expected token {token_id}, got {got}"
            first = asyncio.ensure_future(anext(stream))
        assert not shared.left, "the client was noted as gone before its last token"
        client.tokens.put_nowait(None)
        await asyncio.wait([first], timeout=PATIENCE_S)
        assert first.done() and isinstance(first.exception(), StopAsyncIteration), "the stream must end when None comes"
        assert_left_once(shared, client, "after the last token")

    asyncio.run(scenario())


@pytest.mark.task("5.4", hint="Whatever ends a generator in the middle, its finally block still runs.")
@pytest.mark.parametrize("how", ["cancelled", "closed", "cancelled before the first token"])
def test_who_goes_away_leaves_a_note(chapter: ModuleType, how: str) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine())
        stream, first, client = await begun(shared, [1, 2])
        shared.note.clear()
        if how != "cancelled before the first token":
            client.tokens.put_nowait(3)
            await first
        if how == "closed":
            await stream.aclose()
        else:
            waiting = first if not first.done() else asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting], timeout=PATIENCE_S)
            assert waiting.done() and waiting.cancelled(), "a cancelled stream must pass the cancellation on"
        assert_left_once(shared, client, how)

    asyncio.run(scenario())


@pytest.mark.task("5.4", hint="Check first: nobody should arrive who could never be served.")
@pytest.mark.parametrize(("prompt", "count"), [([], 5), ([1], 0), ([1] * 60, 60), ([97], 5), ([1] * 30, 20)])
def test_a_request_that_can_never_be_served_leaves_no_note(chapter: ModuleType, prompt: list[int], count: int) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine(num_blocks=8))
        with pytest.raises(ValueError):
            await within(anext(shared.stream(prompt, count)), f"{len(prompt)} tokens and {count} new ones were not refused")
        assert not shared.arrived and not shared.left, "a request that was refused must not leave a note"

    asyncio.run(scenario())


@pytest.mark.task(
    "5.4", hint="An exception can come out of the queue as well as a token; and there may be a failure already."
)
@pytest.mark.parametrize("already", [True, False], ids=["failed before", "fails meanwhile"])
def test_a_failed_engine_raises_instead_of_waiting(chapter: ModuleType, already: bool) -> None:
    async def scenario() -> None:
        failure = RuntimeError("the step failed")
        shared = chapter.AsyncEngine(make_engine())
        if already:
            shared.failure = failure
            waiting = asyncio.ensure_future(anext(shared.stream([1], 5)))
        else:
            _, waiting, client = await begun(shared, [1])
            client.tokens.put_nowait(failure)
        await asyncio.wait([waiting], timeout=PATIENCE_S)
        assert waiting.done(), "the engine had failed, and the stream still waits for a token"
        error = waiting.exception()
        assert isinstance(error, chapter.EngineFailedError), f"expected EngineFailedError, got {error!r}"
        assert error.__cause__ is failure, f"its cause must be what the step raised, got {error.__cause__!r}"

    asyncio.run(scenario())


@pytest.mark.task("5.4", hint="Each part may work on its own: look at what travels between them.")
def test_many_clients_get_what_hugging_face_gives(chapter: ModuleType, seed: int) -> None:
    draw = Random(seed)
    prompts = [draw.choices(range(96), k=length) for length in (3, 17, 2, 30, 1)]
    base = random_gpt2(seed=5 + seed)
    base.config.eos_token_id = None  # so that there is always a shortage of blocks
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=8)
    engine = ch04_scheduler.Engine(base, config)

    async def scenario() -> None:
        shared = chapter.AsyncEngine(engine)

        async def ask(number: int) -> list[int]:
            for _ in range(number):
                await asyncio.sleep(0.002)  # they do not come all at once
            return [token_id async for token_id in shared.stream(prompts[number], 20)]

        async def leave_early() -> None:
            async with aclosing(shared.stream([9, 9, 9], 20)) as tokens:
                async for _ in tokens:
                    return

        loop = asyncio.create_task(shared.run())
        several = asyncio.gather(*map(ask, range(5)), leave_early())
        *answers, _ = await within(several, "not all clients got all their tokens", loop)
        for number, answer in enumerate(answers):
            assert_same_tokens(answer, hf_greedy(base, prompts[number], 20), what=f"client {number}'s answer")
        for _ in range(100):
            await asyncio.sleep(0.002)
        free = engine.cache.num_free_blocks
        assert free == 14, f"everybody is gone, but only {free} of 14 blocks are free"
        assert not shared.clients and not shared.left, "everybody is gone, but the engine still serves someone"
        await ended(loop)

    asyncio.run(scenario())
    assert any(trace.preempted for trace in engine.history), "the situation did not arise: nobody was preempted"


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The app behind a real socket on a free port; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        for _ in range(int(PATIENCE_S / 0.01)):
            if server.started:
                break
            time.sleep(0.01)
        assert server.started, f"the server did not start (waited for {PATIENCE_S:.0f} s)"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


async def events(client: httpx.AsyncClient, prompt: str, max_new_tokens: int, limit: int | None = None) -> list[Any]:
    """The events of one request, all of them or the first ``limit``, after which the client hangs up."""
    found = []
    async with client.stream("POST", "/generate", json={"prompt": prompt, "max_new_tokens": max_new_tokens}) as response:
        assert response.status_code == 200, f"expected status 200, got {response.status_code}"
        async for line in response.aiter_lines():
            if line:
                found.append(line.removeprefix("data: "))
            if len(found) == limit:
                return found
    assert found[-1] == "[DONE]", f"the stream must end with [DONE], got {found[-1]}"
    return [json.loads(text) for text in found[:-1]]


async def until_idle(client: httpx.AsyncClient, num_blocks: int) -> None:
    health: dict[str, Any] = {}
    for _ in range(500):
        health = (await client.get("/health")).json()
        if health["clients"] == 0 and health["free_blocks"] == num_blocks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"all clients are gone, but the server says {health}; expected {num_blocks} free blocks")


@pytest.mark.task("5.4", hint="Over HTTP a client that hangs up cancels its stream. Look at what your generator does then.")
def test_over_http_clients_share_the_engine_and_may_hang_up(chapter: ModuleType) -> None:
    engine = make_engine(64, vocab_size=VOCAB_SIZE, bos_token_id=256, eos_token_id=256)
    tokenizer = byte_tokenizer()
    texts = ["a", "Hello there", "the third of them"]

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_S) as client:
            several = [events(client, text, 30) for text in texts] + [events(client, "bye", 40, limit=2)]
            *answers, partial = await asyncio.gather(*several)
            for text, answer in zip(texts, answers, strict=True):
                prompt = tokenizer.encode(text)
                got = [item["token_id"] for item in answer if item["token_id"] is not None]
                assert_same_tokens(got, hf_greedy(engine.model, prompt, 30, 256), what=f"the answer to {text!r}")
            assert len(partial) == 2
            await until_idle(client, 64)
            refused = await client.post("/generate", json={"prompt": "a", "max_new_tokens": 1000})
            assert refused.status_code == 400, (
                f"a request that never fits must be refused with 400, got {refused.status_code}"
            )

    with running(chapter.create_app(engine, tokenizer)) as address:
        asyncio.run(scenario(address))
