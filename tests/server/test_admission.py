"""The bounded queue counts what waits, and says when to come back."""

import asyncio
import math
from collections import deque

import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.server.link.admission import MAX_RETRY_AFTER_S, UNKNOWN_RETRY_AFTER_S, Admission, QueueFullError
from pagebrain.server.options import ServerOptions
from tests.server.support_in_process import SETTINGS, InProcessClient


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_limit_of_requests_is_reached_and_left_again() -> None:
    queue = Admission(max_requests=2, max_tokens=100)
    for name in ("a", "b"):
        queue.check(1, 10)
        queue.wait(name, 10)
    with pytest.raises(QueueFullError, match="2 requests are waiting and 1 more would pass the limit of 2"):
        queue.check(1, 10)
    queue.start("a")
    with pytest.raises(QueueFullError, match="1 request is waiting and 2 more would pass the limit of 2"):
        queue.check(2, 10)
    queue.check(1, 10)
    queue.wait("c", 10)
    queue.leave("b")
    queue.leave("c")
    assert (queue.num_requests, queue.num_tokens) == (0, 0)


def test_the_limit_of_tokens_counts_what_waits_and_nothing_else() -> None:
    queue = Admission(max_requests=10, max_tokens=100)
    queue.wait("a", 60)
    with pytest.raises(QueueFullError, match="60 prompt tokens are waiting and 41 more would pass the limit of 100"):
        queue.check(1, 41)
    queue.check(1, 40)
    queue.start("a")
    queue.check(1, 100)


def test_a_request_larger_than_the_limit_is_let_in_when_nobody_waits() -> None:
    queue = Admission(max_requests=10, max_tokens=100)
    queue.check(1, 500)
    queue.check(11, 1)
    queue.wait("a", 1)
    for num_requests, num_tokens in ((1, 500), (11, 1)):
        with pytest.raises(QueueFullError):
            queue.check(num_requests, num_tokens)


@pytest.mark.parametrize(("num_requests", "num_tokens"), [(3, 1), (1, 41)])
def test_one_client_may_fill_half_of_a_queue_with_turns(num_requests: int, num_tokens: int) -> None:
    queue = Admission(max_requests=8, max_tokens=100)
    for name in ("a", "b"):
        queue.check(1, 5, "greedy")
        queue.wait(name, 5, "greedy")
    with pytest.raises(QueueFullError, match="2 requests are waiting from this client with 10 prompt tokens"):
        queue.check(num_requests, num_tokens, "greedy")
    queue.check(num_requests, num_tokens)
    queue.check(6, 90, "another")  # which has none waiting
    queue.start("a")
    queue.leave("b")
    queue.check(num_requests, num_tokens, "greedy")


def test_leaving_twice_and_starting_after_leaving_change_nothing() -> None:
    queue = Admission(max_requests=10, max_tokens=100)
    queue.wait("a", 5)
    for leave in (queue.leave, queue.leave, queue.start):
        leave("a")
        assert (queue.num_requests, queue.num_tokens) == (0, 0)


class Engine:
    """Serves a queue on a clock of its own: ``batch`` requests get their first token with each step."""

    def __init__(self, batch: int, step_s: float, max_requests: int = 1000) -> None:
        self.batch, self.step_s = batch, step_s
        self.clock = Clock()
        self.queue = Admission(max_requests, max_tokens=10**6, clock=self.clock)
        self.waiting: deque[str] = deque()
        self.num_arrived = 0
        self.next_step_s = self.clock.now_s + step_s

    def arrive(self) -> int | None:
        """One request more; returns what it is told if it is refused."""
        try:
            self.queue.check(1, 1)
        except QueueFullError as refused:
            return refused.retry_after_s
        self.num_arrived += 1
        self.waiting.append(str(self.num_arrived))
        self.queue.wait(self.waiting[-1], 1)
        return None

    def run(self, seconds: float) -> None:
        """Let time go by."""
        until_s = self.clock.now_s + seconds
        while self.next_step_s <= until_s:
            self.clock.now_s = self.next_step_s
            for _ in range(min(self.batch, len(self.waiting))):
                self.queue.start(self.waiting.popleft())
            self.next_step_s += self.step_s
        self.clock.now_s = until_s


@pytest.mark.parametrize("busy_before", [False, True])
@pytest.mark.parametrize(("batch", "step_s", "empties_s"), [(64, 0.125, 2.0), (8, 0.5, 62.5), (1, 0.02, 20.0)])
def test_what_is_said_in_a_burst_is_how_long_the_queue_takes_to_empty(
    batch: int, step_s: float, empties_s: float, busy_before: bool
) -> None:
    engine = Engine(batch, step_s)
    for _ in range(80 if busy_before else 0):  # one request at a time, which says nothing about what a long queue can expect
        engine.arrive()
        engine.run(step_s)
    assert [engine.arrive() for _ in range(1000)] == [None] * 1000
    assert engine.arrive() == UNKNOWN_RETRY_AFTER_S  # nothing has shown yet how fast so long a queue is
    for _ in range(10):
        engine.run(max(0.1, step_s))
        while engine.arrive() is None:
            pass
        said_s = engine.arrive()
        assert said_s is not None and said_s <= max(UNKNOWN_RETRY_AFTER_S, 1.5 * empties_s)
    assert said_s == pytest.approx(min(MAX_RETRY_AFTER_S, empties_s), rel=0.15, abs=1)


def test_the_time_to_come_back_is_forgotten_with_the_pace() -> None:
    engine = Engine(batch=10, step_s=0.5, max_requests=100)
    while engine.arrive() is None:
        pass
    engine.run(2.0)
    while engine.arrive() is None:
        pass
    assert engine.arrive() == 5  # a hundred wait, and twenty a second were served
    engine.next_step_s = math.inf  # the engine is paused
    engine.run(5.0)
    assert engine.arrive() == 18  # forty in seven seconds
    engine.run(11.0)
    assert engine.arrive() == UNKNOWN_RETRY_AFTER_S


def test_what_the_engine_has_said_is_heard_before_a_request_is_refused() -> None:
    client = InProcessClient(LLM(**SETTINGS), ServerOptions(max_queued_requests=1))
    params = SamplingParams(max_tokens=2, ignore_eos=True)

    async def scenario() -> None:  # up to the last line in one turn of the event loop
        await client.start()
        client.submit([50, 60], params, "a")
        with pytest.raises(QueueFullError):
            client.submit([50, 60], params, "b")
        client.handle.unread.append(client.handle.step())
        client.submit([50, 60], params, "b")
        await client.stop()

    asyncio.run(scenario())


def test_what_is_remembered_of_those_who_were_served_is_bounded() -> None:
    engine = Engine(batch=1, step_s=0.001)
    for _ in range(20_000):
        engine.arrive()
        engine.run(0.001)
    assert len(engine.queue._pace._slices) <= 42  # ten seconds of them
