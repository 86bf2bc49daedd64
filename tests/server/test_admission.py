"""The bounded queue counts what waits, and says when to come back."""

import pytest

from pagebrain.server.admission import MAX_RETRY_AFTER_S, UNKNOWN_RETRY_AFTER_S, Admission, QueueFullError


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


def test_leaving_twice_and_starting_after_leaving_change_nothing() -> None:
    queue = Admission(max_requests=10, max_tokens=100)
    queue.wait("a", 5)
    for leave in (queue.leave, queue.leave, queue.start):
        leave("a")
        assert (queue.num_requests, queue.num_tokens) == (0, 0)


def test_the_time_to_come_back_follows_the_pace_of_the_last_seconds() -> None:
    clock = Clock()
    queue = Admission(max_requests=30, max_tokens=10**6, clock=clock)

    def retry_after_s() -> int:
        with pytest.raises(QueueFullError) as caught:
            queue.check(31, 1)
        return caught.value.retry_after_s

    queue.wait("first", 1)
    assert retry_after_s() == UNKNOWN_RETRY_AFTER_S <= 2  # nobody has been served yet
    for number in range(20):
        queue.wait(f"served-{number}", 1)
        queue.start(f"served-{number}")
        clock.now_s += 0.5
    for number in range(9):
        queue.wait(f"waiting-{number}", 1)
    assert retry_after_s() == 5  # ten wait, and two a second were served
    clock.now_s += 9.2
    assert retry_after_s() == MAX_RETRY_AFTER_S  # one in ten seconds
    clock.now_s += 1
    assert retry_after_s() == UNKNOWN_RETRY_AFTER_S  # the pace of long ago says nothing


def test_the_pace_of_a_server_that_was_idle_is_that_of_its_busy_time() -> None:
    clock = Clock()
    queue = Admission(max_requests=8, max_tokens=10**6, clock=clock)
    for number in range(8):
        queue.wait(str(number), 1)
    for number in range(4):
        queue.start(str(number))
        clock.now_s += 0.25
    with pytest.raises(QueueFullError) as caught:
        queue.check(5, 1)
    assert caught.value.retry_after_s == 1  # four were served in a second, and four wait


def test_what_is_remembered_of_those_who_were_served_is_bounded() -> None:
    clock = Clock()
    queue = Admission(max_requests=30, max_tokens=10**6, clock=clock)
    for number in range(1000):
        clock.now_s += 0.1
        queue.wait(str(number), 1)
        queue.start(str(number))
    assert len(queue._started) <= 102  # ten seconds of them
