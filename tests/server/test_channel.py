"""What goes wrong between the two processes is told to both sides: neither waits for ever."""

import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pagebrain.server.link.messages import Channel


class End:
    """One end of a pipe, with what it heard."""

    def __init__(self, connection: Any, name: str, choke: bool = False) -> None:
        self.heard: list[Any] = []
        self.ended = threading.Event()
        self.got = threading.Event()
        self.choke = choke
        self.connection = connection
        self.channel = Channel(connection, self.receive, self.ended.set, name)
        self.channel.start()

    def receive(self, messages: list[Any]) -> None:
        if self.choke:
            raise KeyError("a mistake in the server")
        self.heard.extend(messages)
        self.got.set()


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    ours, theirs = multiprocessing.Pipe()
    pair = End(ours, "ours"), End(theirs, "theirs")
    yield pair
    for end in pair:
        end.connection.close()


def test_messages_arrive_in_order_in_both_directions(ends: tuple[End, End]) -> None:
    for sender, receiver in (ends, ends[::-1]):
        for number in range(200):
            sender.channel.send(number)
        while len(receiver.heard) < 200:
            assert receiver.got.wait(10)
            receiver.got.clear()
        assert receiver.heard == list(range(200))


def test_what_is_left_is_sent_before_the_end(ends: tuple[End, End]) -> None:
    ends[0].channel.send("last words")
    ends[0].channel.flush(10)
    assert ends[1].got.wait(10) and ends[1].heard == ["last words"]


def test_a_message_that_cannot_be_sent_ends_the_channel(ends: tuple[End, End], caplog: pytest.LogCaptureFixture) -> None:
    ends[0].channel.send(lambda: "functions cannot be pickled")
    assert ends[0].ended.wait(10)
    assert "could not be sent" in caplog.text


def test_a_message_that_cannot_be_handled_ends_the_channel(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = multiprocessing.Pipe()
    sender, receiver = End(ours, "ours"), End(theirs, "theirs", choke=True)
    sender.channel.send("hello")
    assert receiver.ended.wait(10)
    assert "could not be read" in caplog.text
    ours.close()
    theirs.close()


def test_the_other_end_is_missed_when_it_is_gone() -> None:
    ours, theirs = multiprocessing.Pipe()
    end = End(ours, "ours")
    theirs.close()
    assert end.ended.wait(10)
    end.channel.close()
    assert ours.closed
