"""Chapter 05: notes are read between steps, tokens reach their clients, no client waits forever, no blocks stay behind.

Races are tested on a loop of the tests' own (``tests/support/own_loop.py``): steps are held at the moment of interest, and
its clock jumps, so an hour of waiting takes no time.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
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
from tests.support.answers import assert_text
from tests.support.departures import assert_same_tokens
from tests.support.hints import hint
from tests.support.models import hf_greedy, random_gpt2
from tests.support.own_loop import Hold, OwnLoop, run
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

CHAPTER = "05"
PATIENCE_S = 10.0
"""How long a test waits for what must come, by the clock of its loop. Reached only when it never comes."""

END = 96
"""The end-of-text token of the tests' models."""


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


def own_loop() -> OwnLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, OwnLoop)
    return loop


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
        raise AssertionError(what)
    return task.result()


async def rest(what: str, loop: "asyncio.Task[None] | None" = None) -> None:
    """Let all that can run do so, until every coroutine waits; a failure that says ``what`` if that never comes."""
    await within(own_loop().rest(), what, loop)


async def let_an_hour_pass() -> None:
    """By the loop's clock: five seconds in which every timer rings, then the rest in one leap."""
    await asyncio.sleep(5)
    own_loop().now += 3600
    await asyncio.sleep(0.001)


# 5.1 -------------------------------------------------------------------------------------------------------------------

NOTES = "Walk through arrived, then through departed. Which clients have a sequence, and which sequences still hold blocks?"


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
        "the scheduler's waiting list must hold the clients' sequences, first come first"
    )
    assert [seq.token_ids for seq in waiting] == prompts, "a prompt went to the wrong client"
    limits = [len(prompt) + count for prompt, count in zip(prompts, counts)]
    assert [seq.max_num_tokens for seq in waiting] == limits, "max_new_tokens went to the wrong client"
    assert shared.clients == {client.seq.seq_id: client for client in clients}, (
        "clients must hold each one by its sequence id"
    )
    assert not shared.arrived and not shared.departed, "the notes must be gone once they were acted on"


@pytest.mark.task("5.1", hint=NOTES)
def test_notes_are_acted_on_once(chapter: ModuleType) -> None:
    shared = chapter.AsyncEngine(make_engine())
    arrive(chapter, shared, [1])
    shared.read_notes()
    assert not shared.arrived, "the notes in arrived must be gone once they were acted on"
    shared.read_notes()
    count = len(shared.engine.scheduler.waiting)
    assert count == 1, f"one client arrived and the notes were read twice: expected 1 request in the engine, got {count}"


LOST = "A note that is thrown away before it was acted on is lost if acting on it fails."


@pytest.mark.task("5.1", hint=LOST)
def test_no_client_is_forgotten_if_the_engine_refuses_one(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = chapter.AsyncEngine(make_engine())
    clients = [arrive(chapter, shared, [number]) for number in range(3)]
    add_request = shared.engine.add_request

    def refuse_the_second(prompt: list[int], max_new_tokens: int) -> Sequence:
        if prompt == [1]:
            raise RuntimeError("no room in the waiting list")
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


@pytest.mark.task("5.1", hint=LOST)
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_no_departure_is_forgotten_if_one_fails(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    shared = chapter.AsyncEngine(make_engine())
    clients = [arrive(chapter, shared, [number]) for number in range(3)]
    shared.read_notes()
    shared.departed.extend(clients)
    finish = shared.engine.finish
    asked: list[Sequence] = []

    def refuse_one(seq: Sequence) -> None:
        asked.append(seq)
        if seq is clients[fails].seq:
            raise RuntimeError("the sequence could not be ended")
        finish(seq)

    monkeypatch.setattr(shared.engine, "finish", refuse_one)
    with suppress(RuntimeError):
        shared.read_notes()
    assert clients[fails].seq in asked, f"three clients departed, and Engine.finish was not called for client {fails}"
    lost = [number for number, client in enumerate(clients) if not client.seq.is_finished and client not in shared.departed]
    with hint("Take a note off departed only after Engine.finish has ended its sequence, also the note in hand."):
        assert not lost, (
            f"clients 0, 1, 2 departed, and Engine.finish raised for client {fails}: the notes of {lost} are no longer in "
            "departed, and their sequences were not ended"
        )


@pytest.mark.task("5.1", hint=LOST)
def test_no_departure_is_forgotten_if_an_arrival_is_refused(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = chapter.AsyncEngine(make_engine())
    served = arrive(chapter, shared, [1])
    shared.read_notes()
    comes = arrive(chapter, shared, [2])
    shared.departed.extend([served, comes])  # the second one departs before its arrival is read

    def refuse(prompt: list[int], max_new_tokens: int) -> Sequence:
        raise RuntimeError("no room in the waiting list")

    monkeypatch.setattr(shared.engine, "add_request", refuse)
    with suppress(RuntimeError):
        shared.read_notes()
    assert served.seq.is_finished or served in shared.departed, (
        "add_request raised for a client that arrived: the departure of another client is no longer in departed, and its "
        "sequence was not ended"
    )


LEAVES = "A sequence whose client has departed has no reader. End it with Engine.finish, so that its blocks are free again."


@pytest.mark.task("5.1", hint=LEAVES)
@pytest.mark.parametrize("num_steps", [0, 1, 3], ids=["waiting", "after its prompt", "in mid-answer"])
def test_a_departed_client_is_served_no_more_and_others_are(chapter: ModuleType, num_steps: int, seed: int) -> None:
    draw = Random(seed)
    shared = chapter.AsyncEngine(make_engine())
    shared.engine.model.config.eos_token_id = None
    clients = [arrive(chapter, shared, draw.choices(range(96), k=draw.randint(1, 4))) for _ in range(4)]
    stays = clients[1]
    leaving = [client for client in clients if client is not stays]
    draw.shuffle(leaving)
    shared.read_notes()
    for _ in range(num_steps):
        shared.engine.step()
    shared.departed.extend(leaving)
    shared.read_notes()
    for number, leaves in enumerate(leaving, start=1):
        who = f"departure {number} of the 3 in departed (sequence {leaves.seq.seq_id})"
        assert leaves.seq.is_finished, f"{who}: the sequence of a client that departed must be ended"
        held = shared.engine.cache.block_table(leaves.seq.seq_id)
        assert not held, f"{who}: the client departed, but its sequence still holds blocks {list(held)}"
        queued = [*shared.engine.scheduler.waiting, *shared.engine.scheduler.running]
        assert leaves.seq not in queued, f"{who}: the client departed, but its sequence is still in the scheduler"
    assert shared.clients == {stays.seq.seq_id: stays}, (
        f"clients must hold only the client that stays, sequence {stays.seq.seq_id}, but it holds {sorted(shared.clients)}"
    )
    assert not shared.departed, "the notes in departed must be gone once they were acted on"
    for _ in range(20):
        group = shared.engine.step()
        if group is None:
            break
        assert all(entry.seq is stays.seq for entry in group), "a step computed the sequence of a client that had departed"
    assert len(stays.seq.output_token_ids) == 5, "the client that stayed did not get all its tokens"


@pytest.mark.task(
    "5.1", hint="A preempted sequence waits in the scheduler's waiting list and runs again later. It is not finished."
)
def test_a_client_may_leave_while_its_sequence_is_preempted(chapter: ModuleType) -> None:
    shared = chapter.AsyncEngine(make_engine(num_blocks=4))
    shared.engine.model.config.eos_token_id = None
    stays, leaves = (arrive(chapter, shared, [number] * 6) for number in range(2))
    shared.read_notes()
    for _ in range(20):
        shared.engine.step()
        if leaves.seq.status is SequenceStatus.PREEMPTED:
            break
    assert leaves.seq.status is SequenceStatus.PREEMPTED, "the situation did not arise: no sequence was preempted"
    shared.departed.append(leaves)
    shared.read_notes()
    assert leaves.seq.is_finished, "the client departed while its sequence was preempted: the sequence must be ended"
    assert not shared.engine.scheduler.waiting, (
        "the client departed, but its preempted sequence still waits in the scheduler"
    )


@pytest.mark.task("5.1", hint="Both notes of such a client are there at the same time. Read the arrivals first.")
def test_a_client_that_came_and_departed_between_two_steps_holds_nothing(chapter: ModuleType) -> None:
    shared = chapter.AsyncEngine(make_engine())
    client = arrive(chapter, shared, [1, 2, 3])
    shared.departed.append(client)
    shared.read_notes()
    assert not shared.clients, "a client came and departed between two steps, and it is still in clients"
    group = shared.engine.step()
    assert group is None, "the engine computed a step for a client that had departed already"


@pytest.mark.task(
    "5.1", hint="After its last token the engine has ended the sequence, and deliver has taken the client out."
)
def test_leaving_after_the_last_token_changes_nothing(chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = chapter.AsyncEngine(make_engine())
    client = arrive(chapter, shared, [1, 2, 3], 1)
    shared.read_notes()
    shared.engine.step()
    assert client.seq.is_finished
    shared.clients.clear()  # as deliver leaves it
    shared.departed.append(client)
    ended: list[Sequence] = []
    monkeypatch.setattr(shared.engine, "finish", ended.append)
    try:
        shared.read_notes()
    except KeyError as error:
        raise AssertionError(f"deliver has taken the client out already, and read_notes raised KeyError: {error}") from None
    assert not ended, "Engine.finish was called for a sequence that had finished"
    assert not shared.departed, "the note must be gone once it was acted on"


# 5.2 -------------------------------------------------------------------------------------------------------------------


def entry(number: int, output: list[int], *, samples: bool = True, finished: bool = False, start: int | None = None) -> Any:
    """A sequence's part of a step that has been computed: ``output`` are its tokens so far.

    It computed from token ``start``: by default all of the prompt, or one token after it. One that does not sample computed
    a single token.
    """
    request = Request(str(number), None, (7, 8, 9), SamplingParams(temperature=0), number, number, 0.0)
    status = SequenceStatus.FINISHED if finished else SequenceStatus.RUNNING
    seq = Sequence(number, request, 0, 32, token_ids=[7, 8, 9, *output], status=status)
    if not samples:
        return ScheduledSequence(seq, start or 0, 1, False)
    if start is None:
        start = 0 if len(output) == 1 else len(seq.token_ids) - 2
    return ScheduledSequence(seq, start, len(seq.token_ids) - 1 - start, True)


def serve(chapter: ModuleType, *entries: ScheduledSequence) -> tuple[Any, dict[int, Any]]:
    shared = chapter.AsyncEngine(make_engine())
    for part in entries:
        client = chapter.Client([7, 8, 9], 30)
        client.seq = part.seq
        shared.clients[part.seq.seq_id] = client
    return shared, dict(shared.clients)


def about_the_missing(entries: Iterable[ScheduledSequence], got: dict[int, list[int]]) -> str:
    """More about the clients that got no token although the step sampled one for them."""
    missing = [entry for entry in entries if entry.samples and not got[entry.seq.seq_id]]
    return "".join(
        f"; client {entry.seq.seq_id} got none: its entry has {entry.num_tokens} tokens and samples is true, as the last "
        "chunk of a prompt has"
        for entry in missing
        if entry.num_tokens > 1
    )


NEWEST = (
    "The newest token of the entry's sequence goes into the token queue of the client with that sequence's id, by "
    "put_nowait. Every token id is a token: 0, and the end-of-text token, too."
)


@pytest.mark.task("5.2", hint=NEWEST)
def test_each_client_gets_its_own_newest_token(chapter: ModuleType, seed: int) -> None:
    draw = Random(seed)
    ends = [draw.randrange(1, END), 0, END, draw.randrange(1, END), 0]
    lengths = draw.sample([0, 1, 2, 3, 4], k=5)
    numbers = draw.sample(range(50), k=5)
    outputs = {n: [*draw.choices(range(97), k=k), end] for n, k, end in zip(numbers, lengths, ends, strict=True)}
    entries = [entry(number, output) for number, output in outputs.items()]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(reversed(entries))))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    expected = {number: output[-1:] for number, output in outputs.items()}
    more = about_the_missing(entries, got)
    assert got == expected, f"expected each client's own newest token, {expected}, got {got}{more}"
    assert shared.clients == clients, "clients that are not done must stay"


@pytest.mark.task(
    "5.2", hint="A step samples for an entry if entry.samples says so. Chunks of any kind can come before that."
)
def test_a_chunk_brings_a_token_only_if_it_samples(chapter: ModuleType) -> None:
    entries = [
        entry(1, [], samples=False),  # the first chunk of a prompt
        entry(2, [20]),
        entry(3, [30], start=1),  # the last chunk of a prompt
        entry(4, [40, 41], samples=False, start=3),  # a chunk of a sequence that was preempted and has tokens already
        entry(5, [50, 51, 52], start=1),  # the last chunk of such a one
    ]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(entries)))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    expected = {1: [], 2: [20], 3: [30], 4: [], 5: [52]}
    more = about_the_missing(entries, got)
    assert got == expected, (
        f"sequences 2, 3 and 5 sampled in this step, 1 and 4 did not: expected {expected}, got {got}{more}"
    )


@pytest.mark.task(
    "5.2", hint="After its last token a client gets None and is taken out of clients. seq.is_finished says which is last."
)
def test_the_end_follows_the_last_token(chapter: ModuleType) -> None:
    entries = [entry(1, [10, 11], finished=True), entry(2, [20]), entry(3, [30], finished=True), entry(4, [END])]
    entries += [entry(5, [50, END], finished=True), entry(6, [0], finished=True)]
    shared, clients = serve(chapter, *entries)
    shared.deliver(SequenceGroup(tuple(entries)))
    got = {number: drain(client.tokens) for number, client in clients.items()}
    expected = {1: [11, None], 2: [20], 3: [30, None], 4: [END], 5: [END, None], 6: [0, None]}
    assert got == expected, f"sequences 2 and 4 have not finished, the others have: expected {expected}, got {got}"
    served = sorted(shared.clients)
    assert served == [2, 4], f"only clients 2 and 4 are still being served, but clients holds {served}"


@pytest.mark.task("5.2", hint="Only those who were part of the step have anything to get.")
def test_who_was_not_in_the_step_gets_nothing(chapter: ModuleType) -> None:
    computed, absent = entry(1, [10]), entry(2, [20, 21])
    shared, clients = serve(chapter, computed, absent)
    shared.deliver(SequenceGroup((computed,)))
    got = drain(clients[2].tokens)
    assert got == [], f"sequence 2 was not in the step, but its client got {got}"


@pytest.mark.task(
    "5.2", hint="A queue keeps all tokens until its client reads them. What lies in it already does not matter."
)
def test_the_queue_of_a_client_that_does_not_read_keeps_every_token(chapter: ModuleType, seed: int) -> None:
    """Real steps, with chunks, a preemption and an end-of-text token."""
    base = random_gpt2(seed=5)
    base.config.eos_token_id = None
    prompts = {0: [1, 2, 3], 1: [4] * 9, 2: Random(seed).choices(range(96), k=7)}
    answers = {number: hf_greedy(base, prompt, 12) for number, prompt in prompts.items()}
    base.config.eos_token_id = answers[0][3]
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=9, max_num_seqs=4, max_num_batched_tokens=4)
    shared = chapter.AsyncEngine(ch04_scheduler.Engine(base, config))
    clients = {}
    for number, prompt in prompts.items():
        clients[number] = client = chapter.Client(prompt, 12)
        client.seq = shared.engine.add_request(prompt, 12)
        shared.clients[client.seq.seq_id] = client
    while (group := shared.engine.step()) is not None:
        shared.deliver(group)
    for number, prompt in prompts.items():
        *tokens, end = drain(clients[number].tokens) or [None]
        expected = hf_greedy(base, prompt, 12, base.config.eos_token_id)
        assert_same_tokens(
            [*tokens], expected, what=f"what lies in the token queue of client {number}, read only at the end,"
        )
        assert end is None, f"the last item of client {number}'s token queue must be None, got {end!r}"
    assert not shared.clients, f"all sequences have finished, but clients holds {sorted(shared.clients)}"


# 5.3 -------------------------------------------------------------------------------------------------------------------


class Steps:
    """What the scripted engine's steps did: how many began, in which threads, and whether two ran at the same time."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.num_running = 0
        self.overlapped = False


def scripted(chapter: ModuleType, step: Callable[[], Any]) -> tuple[Any, list[str], Steps]:
    """The learner's loop around an engine whose step is the test's, and a log of what it did in which order.

    One client is being served, with sequence id 0, until an entry of that sequence has finished.
    """
    log: list[str] = []
    steps = Steps()
    here = threading.get_ident()

    class Logged(chapter.AsyncEngine):  # type: ignore[misc, name-defined]
        clients: dict[int, Any]

        def read_notes(self) -> None:
            log.append("read" if threading.get_ident() == here else "read in another thread")
            self.clients |= {100 + number: client for number, client in enumerate(self.arrived, start=len(log))}
            self.clients = {seq_id: client for seq_id, client in self.clients.items() if client not in self.departed}
            self.arrived.clear()
            self.departed.clear()

        def deliver(self, group: SequenceGroup) -> None:
            log.append("deliver" if threading.get_ident() == here else "deliver in another thread")
            assert group is not None, "deliver was called with None: there was nothing to compute, and nothing to deliver"
            for part in group:
                if part.seq.is_finished:
                    self.clients.pop(part.seq.seq_id, None)

    def logged() -> Any:
        log.append("step")
        steps.threads.append(threading.get_ident())
        steps.overlapped |= steps.num_running > 0
        steps.num_running += 1
        try:
            return step()
        finally:
            steps.num_running -= 1
            log.append("done")

    engine: Any = make_engine()
    engine.step = logged
    shared = Logged(engine)
    shared.clients[0] = chapter.Client([1], 5)
    shared.note.set()  # there is something to look at
    return shared, log, steps


def groups_of(count: int) -> list[SequenceGroup]:
    """What ``count`` steps of sequence 0 compute; it has finished with the last."""
    return [SequenceGroup((entry(0, [10] * (number + 1), finished=number == count - 1),)) for number in range(count)]


NEVER_STEPPED = "the loop never computed a step"
IDLE = "With nothing to compute, sleep in self.note.wait(). While the event is set it returns immediately: clear it, too."
NONE_SAYS = (
    "Only a step that gives None says that there is nothing to compute. An empty list, or no client, does not say so."
)
ORDER = "Read the notes, compute, deliver if there is a group, and again. Only the step belongs in a thread."


@pytest.mark.task("5.3", hint=ORDER)
def test_notes_are_read_before_each_step_and_tokens_delivered_after_it(chapter: ModuleType, seed: int) -> None:
    num_steps = Random(seed).randint(2, 6)
    groups = groups_of(num_steps)

    async def scenario() -> None:
        idle, here = asyncio.Event(), own_loop()

        def step() -> SequenceGroup | None:
            if groups:
                return groups.pop(0)
            here.call_soon_threadsafe(idle.set)
            return None

        shared, log, steps = scripted(chapter, step)
        loop = asyncio.create_task(shared.run())
        try:
            await within(idle.wait(), "", loop)
        except AssertionError as error:
            count = len(steps.threads)
            said = f"{num_steps} steps were there to compute and then one that finds nothing; the loop began {count}"
            slept = ", and slept before a step gave None" if count and not loop.done() else ""
            with hint(NONE_SAYS if slept else ORDER):
                raise AssertionError(str(error) or said + slept) from error
        waited = own_loop().jumped
        with hint(IDLE):
            await rest("nothing more is there to compute, and the loop goes on and on without sleeping", loop)
        expected = ["read", "step", "done", "deliver"] * num_steps + ["read", "step", "done"]
        assert log[: len(expected)] == expected, f"expected the order {expected}, got {log}"
        with hint("While there is something to compute, the next step begins as soon as the tokens are delivered."):
            assert not waited, f"the loop slept for {waited:g} s between steps, though there was more to compute"

    run(scenario)


@pytest.mark.task("5.3", hint="await asyncio.to_thread(...) lets other coroutines run until the step is done.")
def test_the_network_goes_on_while_a_step_computes(chapter: ModuleType) -> None:
    async def scenario() -> None:
        hold = Hold()
        groups = groups_of(1)

        def step() -> SequenceGroup | None:
            hold.stop()
            return groups.pop() if groups else None

        shared, log, steps = scripted(chapter, step)
        loop = asyncio.create_task(shared.run())
        await within(hold.reached.wait(), NEVER_STEPPED, loop)
        with hint("A step may take as long as it needs. run must not set a limit on its time."):
            await let_an_hour_pass()
            if loop.done():
                ended = "was cancelled" if loop.cancelled() else f"ended with {loop.exception()!r}"
                raise AssertionError(f"a step took an hour by the loop's clock, and meanwhile run {ended}")
            assert shared.failure is None, f"a step took an hour, and run took that for a failure: {shared.failure!r}"
        assert log == ["read", "step"], f"while the first step was computing, expected ['read', 'step'], got {log}"
        hold.release()
        await rest("a step that took an hour has ended, and the loop does not come to rest after it", loop)
        assert "deliver" in log, f"the tokens of a step that took an hour by the loop's clock were not delivered; got {log}"

    run(scenario)


@pytest.mark.task("5.3", hint=IDLE)
def test_an_idle_loop_sleeps(chapter: ModuleType) -> None:
    async def scenario() -> None:
        shared, log, steps = scripted(chapter, lambda: None)
        shared.clients.clear()
        loop = asyncio.create_task(shared.run())
        await rest(
            "nothing more was there to compute and there was no note, and the loop went on and on without sleeping", loop
        )
        if loop.done():
            loop.result()
        assert not loop.done(), "the loop ended when there was nothing to compute; it must wait for the next client"
        assert steps.threads, NEVER_STEPPED
        assert not own_loop().num_jobs, "the loop is idle, but it keeps a thread busy that waits for a note"
        timers = own_loop().timers
        assert not timers, (
            f"the loop is idle, but a timer wakes it in {min(timers, default=0):.3g} s: it asks again and again instead of "
            "sleeping until the event is set"
        )
        await let_an_hour_pass()
        num_steps = len(steps.threads)
        assert num_steps <= 2, (
            f"with nothing to do and no note, expected the loop to try a step and sleep; it tried {num_steps}"
        )

    run(scenario)


WAKES = (
    "When is the event cleared? A note may be written at any moment until the loop sleeps, and there are two kinds of notes."
)


@pytest.mark.task("5.3", hint=WAKES)
@pytest.mark.parametrize("kind", ["arrived", "departed"])
@pytest.mark.parametrize("during_the_step", [True, False], ids=["while the step computes", "while the loop sleeps"])
def test_a_note_wakes_the_loop(chapter: ModuleType, during_the_step: bool, kind: str) -> None:
    async def scenario() -> None:
        hold, second, here = Hold(), asyncio.Event(), own_loop()

        def step() -> None:
            if len(steps.threads) > 1:
                here.call_soon_threadsafe(second.set)
            else:
                hold.stop()

        shared, log, steps = scripted(chapter, step)
        served = shared.clients.pop(0)
        loop = asyncio.create_task(shared.run())
        await within(hold.reached.wait(), NEVER_STEPPED, loop)
        if not during_the_step:
            hold.release()
            await rest("nothing more was there to compute, and the loop does not sleep", loop)
        num_readings = log.count("read")
        getattr(shared, kind).append(served)
        shared.note.set()
        if during_the_step:
            await rest("a step is computing, and the loop does not wait for it", loop)
            with hint(
                "While a step computes, the loop only waits for it. The engine is read and changed between two steps."
            ):
                assert not steps.overlapped, (
                    "a note was written while a step was computing, and a second step began beside it"
                )
                assert log.count("read") == num_readings, "a note was read while a step was computing"
            hold.release()
        moment = "an empty step was computing" if during_the_step else "the loop was asleep"
        await within(
            second.wait(), f"a note was written in {kind} while {moment}, and the loop never woke up to read it", loop
        )
        assert log.count("read") > num_readings, (
            f"a note was written in {kind} while {moment}; a step began, but no note was read"
        )
        assert not steps.overlapped, "two steps ran at the same time"

    run(scenario)


TOLD = "Keep the exception in failure, put it into the token queue of each client in clients and in arrived, raise it again."


@pytest.mark.task("5.3", hint=TOLD)
def test_a_failed_step_reaches_every_client(chapter: ModuleType) -> None:
    failure = RuntimeError("the step failed")

    async def scenario() -> None:
        hold = Hold()

        def step() -> None:
            hold.stop()
            raise failure

        shared, _, _ = scripted(chapter, step)
        served = shared.clients[0]
        loop = asyncio.create_task(shared.run())
        await within(hold.reached.wait(), NEVER_STEPPED, loop)
        late = arrive(chapter, shared, [2])
        shared.note.set()
        hold.release()
        await assert_failed_with(failure, "a step", shared, loop)
        for kind, client in (("was being served", served), ("had just arrived, and its note was not read yet,", late)):
            got = drain(client.tokens)
            assert got == [failure], (
                f"a client that {kind} must be told {failure!r} when a step raised it; its queue got {got}"
            )

    run(scenario)


async def assert_failed_with(failure: Exception, what: str, shared: Any, loop: "asyncio.Task[None]") -> None:
    """``loop`` ends with ``failure``, which ``what`` raised, and keeps it."""
    await asyncio.wait([loop], timeout=PATIENCE_S)
    assert loop.done(), f"{what} raised, and the loop went on"
    result = None if loop.cancelled() else loop.exception()
    if isinstance(result, AssertionError):
        raise result
    assert result is failure, f"run must raise what {what} raised, {failure!r}; it ended with {result!r}"
    assert shared.failure is failure, f"failure must keep what {what} raised, {failure!r}, got {shared.failure!r}"


@pytest.mark.task("5.3", hint="Not only a step can raise: everything between two steps belongs to the loop too.")
@pytest.mark.parametrize("method", ["read_notes", "deliver"])
def test_what_fails_between_steps_reaches_every_client_too(chapter: ModuleType, method: str) -> None:
    failure = RuntimeError(f"{method} failed")

    async def scenario() -> None:
        def fail(*_: object) -> None:
            raise failure

        groups = groups_of(2)
        shared, _, _ = scripted(chapter, lambda: groups.pop(0) if groups else None)
        waits = shared.clients[0]
        setattr(shared, method, fail)
        loop = asyncio.create_task(shared.run())
        await assert_failed_with(failure, method, shared, loop)
        got = drain(waits.tokens)
        assert got == [failure], f"{method} raised {failure!r}, and the client that waits must be told; its queue got {got}"

    run(scenario)


@pytest.mark.task("5.3", hint="asyncio.CancelledError is raised where the loop awaits. It is no Exception: let it pass.")
@pytest.mark.parametrize("in_a_step", [False, True], ids=["while the loop sleeps", "while a step computes"])
def test_a_cancelled_loop_ends_and_is_no_failure(chapter: ModuleType, in_a_step: bool) -> None:
    async def scenario() -> None:
        hold = Hold()
        shared, _, _ = scripted(chapter, hold.stop)
        served = shared.clients[0]
        loop = asyncio.create_task(shared.run())
        await within(hold.reached.wait(), NEVER_STEPPED, loop)
        if not in_a_step:
            hold.release()
        await rest("the loop does not come to rest", loop)
        if loop.done():
            loop.result()
        loop.cancel()
        await asyncio.wait([loop], timeout=PATIENCE_S)
        hold.release()
        moment = "while a step was computing" if in_a_step else "while it slept"
        assert loop.done(), f"the loop was cancelled {moment}, and it went on: something in it catches the cancellation"
        if not loop.cancelled() and (error := loop.exception()) is not None:
            raise error
        assert loop.cancelled(), f"the loop was cancelled {moment}, and it returned: it must pass the cancellation on"
        assert shared.failure is None, f"being cancelled is no failure, but failure is {shared.failure!r}"
        got = drain(served.tokens)
        assert not got, f"being cancelled is no failure, but a client was told {got}"

    run(scenario)


# 5.4 -------------------------------------------------------------------------------------------------------------------


async def begun(shared: Any, prompt: Any, max_new_tokens: int = 9) -> tuple[Any, "asyncio.Task[int]", Any]:
    """A stream whose first token a reader waits for, and its client."""
    num_before = len(shared.arrived)
    stream = shared.stream(prompt, max_new_tokens)
    first = asyncio.ensure_future(anext(stream))
    await rest("a stream waits for its first token, and looks again and again instead of awaiting its queue", None)
    if first.done():
        first.result()
    count = len(shared.arrived) - num_before
    assert count == 1, (
        f"a stream that was begun must add one note to arrived; it held {num_before}, now {len(shared.arrived)}"
    )
    assert shared.note.is_set(), (
        "a note was written in arrived, but the event was not set, so run does not wake up to read it"
    )
    with hint("await client.tokens.get() waits for as long as it takes. A step may take longer than any limit."):
        timers = own_loop().timers
        assert not timers, f"a stream waits for its first token, and a timer wakes it in {min(timers, default=0):.3g} s"
    return stream, first, shared.arrived[-1]


def yielded(waiting: "asyncio.Task[Any]") -> str:
    """What a stream yielded to its reader, as text; empty if it raised or ended."""
    return "" if waiting.cancelled() or waiting.exception() is not None else repr(waiting.result())


def assert_departed_once(shared: Any, client: Any, how: str) -> None:
    """The client's departure is noted. ``client.seq is None`` says that its arrival was not read yet."""
    notes = shared.departed.count(client)
    if client.seq is None and client not in shared.arrived:
        with hint(
            "A departure is a note in departed, also while the arrival is unread. Only read_notes takes notes off lists."
        ):
            raise AssertionError(
                f"{how}: the stream took its note out of arrived, which belongs to read_notes; expected that note to stay "
                f"and one note in departed, got {notes}"
            )
    assert notes == 1, f"{how}: expected one note in departed, got {notes}"
    assert shared.note.is_set(), f"{how}: the note in departed will not be read, because the event was not set"


STREAM = "Note that the client arrived; hand on one token after the other until None comes; note that it departed."


@pytest.mark.task("5.4", hint=STREAM)
def test_tokens_come_one_by_one_until_the_end(chapter: ModuleType, seed: int) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine())
        stream, first, client = await begun(shared, (1, 2), 9)
        assert (list(client.prompt), client.max_new_tokens) == ([1, 2], 9), "the note must say what was asked for"
        shared.note.clear()
        for token_id in (0, END, *Random(seed).choices(range(97), k=2), 0):
            await let_an_hour_pass()
            client.tokens.put_nowait(token_id)
            try:
                got = await within(first, f"token {token_id} was in the queue and was not handed on")
            except StopAsyncIteration:
                raise AssertionError(f"the stream ended when token {token_id} came: only None is the end") from None
            assert got == token_id, f"expected token {token_id}, got {got}"
            first = asyncio.ensure_future(anext(stream))
        assert not shared.departed, "the client was noted as gone before its last token"
        client.tokens.put_nowait(None)
        await asyncio.wait([first], timeout=PATIENCE_S)
        assert first.done(), "None was in the queue, and the stream still waits: it must end when None comes"
        with hint("After the last token the generator only returns. A yield that follows gives the reader one more item."):
            assert not (got := yielded(first)), (
                f"the stream must end when None comes, but it yielded {got} once more: is the file's last yield still there?"
            )
        if not isinstance(error := first.exception(), StopAsyncIteration):
            raise error or AssertionError("the stream must end when None comes")
        assert_departed_once(shared, client, "after the last token")

    run(scenario)


@pytest.mark.task("5.4", hint="Whatever ends a generator in the middle, its finally block still runs.")
@pytest.mark.parametrize("how", ["cancelled before the first token", "cancelled", "closed"])
def test_a_reader_that_goes_away_departs_with_a_note(chapter: ModuleType, how: str) -> None:
    async def scenario() -> None:
        engine = make_engine()
        shared = chapter.AsyncEngine(engine)
        stream, first, client = await begun(shared, [1, 2])
        seq = None
        if how != "cancelled before the first token":
            client.seq = seq = engine.add_request([1, 2], 9)  # as read_notes does it
            shared.arrived.clear()
            shared.clients[seq.seq_id] = client
            engine.step()
            client.tokens.put_nowait(3)
            await within(first, "a token was in the queue and was not handed on")
        shared.note.clear()
        before = dict(shared.clients)
        if how == "closed":
            await within(stream.aclose(), "the reader closed the stream, and it did not end")
        else:
            waiting = first if not first.done() else asyncio.ensure_future(anext(stream))
            await rest("a stream waits for a token, and looks again and again instead of awaiting its queue")
            waiting.cancel()
            await asyncio.wait([waiting], timeout=PATIENCE_S)
            assert waiting.done() and waiting.cancelled(), "a cancelled stream must pass the cancellation on"
        with hint("A step may be under way now. The stream only writes a note; read_notes acts on it between two steps."):
            if seq is not None:
                assert not seq.is_finished, f"{how}: the stream ended its sequence in the engine itself"
                assert seq in engine.scheduler.running, f"{how}: the stream took its sequence out of the scheduler itself"
            assert shared.clients == before, f"{how}: the stream changed clients itself; deliver may still look there"
        assert_departed_once(shared, client, how)

    run(scenario)


@pytest.mark.task(
    "5.4", hint="Add to the lists of notes; other clients' notes are in them too, in the order in which they came."
)
def test_several_notes_lie_side_by_side_in_order(chapter: ModuleType) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine())
        several = [await begun(shared, [number], 9) for number in range(3)]
        got = [list(client.prompt) for client in shared.arrived]
        assert got == [[0], [1], [2]], f"clients with prompts [0], [1], [2] arrived in this order; the notes say {got}"
        for _, waiting, _ in several:
            waiting.cancel()
        await asyncio.wait([waiting for _, waiting, _ in several], timeout=PATIENCE_S)
        lost = [number for number, (_, _, client) in enumerate(several) if client not in shared.departed]
        assert not lost, f"clients 0, 1 and 2 departed between the same two steps; the notes of {lost} are not in departed"

    run(scenario)


@pytest.mark.task("5.4", hint="A stream that nothing was read from has not begun. It writes both notes, or none.")
def test_a_stream_that_is_never_read_writes_both_notes_or_none(chapter: ModuleType) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine())
        stream = shared.stream([1, 2], 9)
        await within(stream.aclose(), "a stream was closed before anything was read, and it did not end")
        unnoticed = [client for client in shared.arrived if client not in shared.departed]
        assert not unnoticed, "a stream was closed before anything was read: it wrote a note in arrived and none in departed"

    run(scenario)


@pytest.mark.task(
    "5.4", hint="Call Engine.check_request first, so that no client arrives whose request can never be served."
)
@pytest.mark.parametrize(("prompt", "count"), [([], 5), ([1], 0), ([1] * 60, 60), ([97], 5), ([1] * 30, 20)])
def test_a_request_that_can_never_be_served_writes_no_note(chapter: ModuleType, prompt: list[int], count: int) -> None:
    async def scenario() -> None:
        shared = chapter.AsyncEngine(make_engine(num_blocks=8))
        with pytest.raises(ValueError):
            await within(anext(shared.stream(prompt, count)), f"{len(prompt)} tokens and {count} new ones were not refused")
        assert not shared.arrived and not shared.departed, "a request that was refused must not write a note"

    run(scenario)


@pytest.mark.task("5.4", hint="An exception can come out of the queue as well as a token, and failure may be set already.")
@pytest.mark.parametrize("already", [True, False], ids=["failed before", "fails meanwhile"])
def test_a_failed_engine_raises_instead_of_waiting(chapter: ModuleType, already: bool) -> None:
    async def scenario() -> None:
        failure = RuntimeError("the step failed")
        shared = chapter.AsyncEngine(make_engine())
        client = None
        if already:
            shared.failure = failure
            waiting = asyncio.ensure_future(anext(shared.stream([1], 5)))
        else:
            _, waiting, client = await begun(shared, [1])
            client.tokens.put_nowait(failure)
        await asyncio.wait([waiting], timeout=PATIENCE_S)
        assert waiting.done(), "the engine had failed, and the stream still waits for a token"
        error = None if waiting.cancelled() else waiting.exception()
        got = f"it yielded {waiting.result()!r}" if error is None and not waiting.cancelled() else f"it ended with {error!r}"
        assert isinstance(error, chapter.EngineFailedError), f"the engine failed: expected EngineFailedError, but {got}"
        with hint("raise EngineFailedError(...) from what the engine failed with."):
            assert error.__cause__ is failure, f"its cause must be what the step raised, got {error.__cause__!r}"
        if client is not None:
            with hint("The note of the departure must be written however the generator ends, failures too."):
                assert_departed_once(shared, client, "after the engine failed")

    run(scenario)


TOGETHER = "The tests of this task before this one may pass; then look at what travels between the four methods."


@pytest.mark.task("5.4", hint=TOGETHER)
def test_many_clients_get_what_hugging_face_gives(chapter: ModuleType, seed: int) -> None:
    draw = Random(seed)
    prompts = [draw.choices(range(96), k=length) for length in (3, 17, 2, 30, 1)]
    base = random_gpt2(seed=5 + seed)
    base.config.eos_token_id = None  # so that there is always a shortage of blocks
    config = PageBrainConfig.for_model(base, block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=8)
    engine = ch04_scheduler.Engine(base, config)

    async def scenario() -> None:
        shared = chapter.AsyncEngine(engine)

        come = [asyncio.Event() for _ in prompts]  # they do not come all at once
        come[0].set()

        async def ask(number: int) -> list[int]:
            await come[number].wait()
            tokens = []
            async for token_id in shared.stream(prompts[number], 20):
                tokens.append(token_id)
                come[min(len(tokens), 4)].set()
            return tokens

        async def leave_early() -> None:
            async with aclosing(shared.stream([9, 9, 9], 20)) as tokens:
                async for _ in tokens:
                    return

        loop = asyncio.create_task(shared.run())
        several = asyncio.gather(*map(ask, range(5)), leave_early())
        *answers, _ = await within(several, "not all clients got all their tokens", loop)
        for number, answer in enumerate(answers):
            assert_same_tokens(answer, hf_greedy(base, prompts[number], 20), what=f"client {number}'s answer")
        await rest("all clients are gone, and the loop does not sleep", loop)
        free = engine.cache.num_free_blocks
        assert free == 14, f"all clients are gone, but only {free} of 14 blocks are free"
        assert not shared.clients and not shared.departed, "all clients are gone, but one is in clients or departed still"

    run(scenario)
    assert any(trace.preempted for trace in engine.history), "the situation did not arise: no sequence was preempted"


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The app behind a real socket on a free port; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
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
            thread.join(PATIENCE_S / 3)


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


@pytest.mark.task(
    "5.4", hint="Over HTTP, a client that closes its connection cancels its stream. What does your generator do then?"
)
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


# 5.5 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.task("5.5", hint="Return a pair: the number that you measured, and a text of one to four sentences.")
def test_the_wait_for_a_first_token_is_measured_and_explained(
    chapter: ModuleType, seed: int, record_property: Callable[[str, object], None]
) -> None:
    answer = chapter.answer_5_5()
    assert isinstance(answer, tuple) and len(answer) == 2, f"expected a number and a text, got {answer!r:.80}"
    number, text = answer
    assert_text("answer_5_5", text)
    record_property("answer", text)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    assert is_number, f"expected the number of steps, got {number!r:.80}"
    expected = steps_until_the_first_token(seed)
    with hint(
        "A step was computing when the note was written, and it counts. In the steps after it, the tokens of the seven "
        "other clients belong to the budget too."
    ):
        assert number >= expected, f"the client waits through more steps than {number:g}"
    with hint("A step computes as much of the prompt as fits into the budget. The step that samples the token is the last."):
        assert number <= expected, f"the client waits through fewer steps than {number:g}"


def steps_until_the_first_token(seed: int) -> int:
    """What the task asks for, counted at chapter 04's engine."""
    draw = Random(seed)
    base = random_gpt2(seed=5, n_positions=512, n_layer=1)
    base.config.eos_token_id = None
    config = PageBrainConfig.for_model(base, block_size=16, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64)
    engine = ch04_scheduler.Engine(base, config)
    others = [engine.add_request(draw.choices(range(96), k=3), 100) for _ in range(7)]
    while min(len(seq.output_token_ids) for seq in others) < 3:
        engine.step()
    engine.step()  # the note is written while this one computes
    late = engine.add_request(draw.choices(range(96), k=300), 5)
    num_steps = 1
    while not late.output_token_ids:
        engine.step()
        num_steps += 1
    assert not any(seq.is_finished for seq in others), "the situation did not arise: a seat was free"
    return num_steps
