"""The fair queue: clients take turns in front of the engine, whose own order and answers stay as they are."""

import asyncio
import queue
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.outputs import OutputDelta
from pagebrain.server.api.service import client_of
from pagebrain.server.link.engine_main import EngineLoop
from pagebrain.server.link.messages import Abort, Control, Ended, Stepped, Submit
from pagebrain.server.options import ServerOptions
from pagebrain.server.run import _Life, listen
from tests.server.support_in_process import ServerThread

SEATS = 4
SETTINGS: dict[str, Any] = {"dtype": "float64", "num_blocks": 64, "max_num_seqs": SEATS, "max_num_batched_tokens": 64}


class Running:
    """A worker that is stepped by hand.

    Attributes:
        started: ids of requests in the order of their first tokens.
        tokens: sample -> its tokens.
    """

    def __init__(self, **settings: Any) -> None:
        self.llm = LLM(**(SETTINGS | settings))
        self.said: list[Any] = []
        self.loop = EngineLoop(self.llm.engine, cast(Any, SimpleNamespace(send=self.said.append)), queue.SimpleQueue())
        self.started: list[str] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}

    def submit(self, name: str, source: str | None, **params: Any) -> None:
        params = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True} | params
        self.loop._act_on(Submit(name, (50, 60), SamplingParams(**params), source))

    def step(self) -> None:
        """Compute one step and note what came."""
        del self.said[:]
        self.loop._step()
        for message in self.said:
            for packed in message.deltas if isinstance(message, Stepped) else ():
                delta = OutputDelta._make(packed)
                if delta.request_id not in self.started:
                    self.started.append(delta.request_id)
                self.tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)

    def finish(self) -> None:
        """Step until nothing is left."""
        while self.loop._may_step:
            self.step()
        assert not self.loop.queue and self.loop.queue.num_sequences == 0


@pytest.fixture(scope="module")
def running() -> Running:
    return Running()


@pytest.fixture(autouse=True)
def afresh(running: Running) -> None:
    running.finish()
    running.started.clear()
    running.tokens.clear()


@pytest.mark.parametrize("is_fair", [True, False])
def test_a_short_request_behind_many_of_one_client_is_served_within_a_turn(running: Running, is_fair: bool) -> None:
    for number in range(100):
        running.submit(f"many-{number}", "many" if is_fair else None)
    running.step()  # the first client has all seats
    running.submit("one", "one" if is_fair else None)
    running.finish()
    assert len(running.started) == 101
    before = running.started.index("one")
    assert before <= 2 * SEATS if is_fair else before == 100
    others = [name for name in running.started if name != "one"]
    assert others == [f"many-{number}" for number in range(100)]


def test_clients_take_turns_whatever_each_has_waiting(running: Running) -> None:
    for source, count in (("a", 30), ("b", 10), ("c", 5)):
        for number in range(count):
            running.submit(f"{source}{number}", source)
    running.finish()
    assert Counter(name[0] for name in running.started[SEATS : SEATS + 15]) == {"a": 5, "b": 5, "c": 5}


def test_what_waits_for_its_turn_counts_as_waiting_and_can_be_aborted(running: Running) -> None:
    running.loop._act_on(Control("pause"))
    for number in range(10):
        running.submit(f"r{number}", "a", n=2)
    (*_, stepped) = running.said
    assert isinstance(stepped, Stepped) and stepped.stats.num_waiting == 20
    assert len(running.llm.engine.scheduler.waiting) == SEATS, "the engine has more than its next step can start"
    for number in range(9, 0, -1):  # the engine has the first two
        running.loop._act_on(Abort(f"r{number}"))
        assert Ended(f"r{number}") in running.said
    assert running.loop.queue.num_sequences == 0
    running.loop._act_on(Control("resume"))
    running.finish()
    assert running.started == ["r0"]


def test_a_request_that_fits_only_an_empty_engine_has_its_turn(running: Running) -> None:
    running.submit("small", "a")
    running.submit("large", "b", n=70, max_tokens=2)  # as many samples have no block each
    running.submit("another", "a")
    running.step()
    assert [seq.request.request_id for seq in running.llm.engine.scheduler.running] == ["small"]
    running.finish()
    assert running.started == ["small", "large", "another"]
    assert sum(len(tokens) for (name, _), tokens in running.tokens.items() if name == "large") == 140


def test_answers_are_those_without_turns_under_preemption_and_the_preempted_resume_first() -> None:
    answers = []
    for is_fair in (True, False):
        running = Running(num_blocks=12, block_size=8, max_num_batched_tokens=16)
        waiting = running.llm.engine.scheduler.waiting
        for number in range(12):
            sampled = {"temperature": 0.9, "seed": None if number % 2 else number}  # without a seed: by its arrival
            source = f"client-{number // 4}" if is_fair else None  # so turns are not the order of arrival
            running.submit(f"r{number}", source, max_tokens=40, n=1 + number % 2, **sampled)
        while running.loop._may_step:
            running.step()
            preempted = [seq.num_tokens > 2 for seq in waiting]
            assert preempted == sorted(preempted, reverse=True), "a new request stands before a preempted one"
        assert running.llm.engine.stats().num_preemptions > 0
        answers.append(running.tokens)
    assert answers[0] == answers[1] and len(answers[0]) == 18


# Who a client is ------------------------------------------------------------------------------------------------------


def from_address(host: str | None) -> Request:
    headers = [(b"x-forwarded-for", b"203.0.113.7"), (b"authorization", b"Bearer made-up")]
    client = None if host is None else (host, 1234)
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "client": client})


def test_a_client_is_its_address_and_not_what_it_says() -> None:
    assert client_of(from_address("192.0.2.1")) == client_of(from_address("::ffff:192.0.2.1")) == "192.0.2.1"
    assert client_of(from_address("2001:db8::1")) == client_of(from_address("2001:db8::2")) != client_of(from_address("::1"))
    assert client_of(from_address(None)) == ""


@pytest.mark.parametrize("is_fair", [True, False])
def test_the_api_names_the_client_if_the_queue_is_fair(running: Running, is_fair: bool) -> None:
    with ServerThread(running.llm, fair_queue=is_fair) as server:
        sent: list[Submit] = []
        submit = server.client.handle.submit

        def spy(request: Submit) -> None:
            sent.append(request)
            submit(request)

        server.client.handle.submit = spy  # type: ignore[method-assign]
        assert server.post("/v1/completions", {"prompt": [[50], [60]], "max_tokens": 1}).status_code == 200
        assert [request.source for request in sent] == ["127.0.0.1" if is_fair else None] * 2


@pytest.mark.parametrize(("believed", "seen"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.7")])
def test_a_proxy_is_believed_only_if_it_is_named(believed: tuple[str, ...], seen: str) -> None:
    listener = listen("127.0.0.1", 0)
    try:
        life = _Life(PageBrainConfig(), ServerOptions(forwarded_allow_ips=believed), listener, parent=1)
        config = life._make_server().config
    finally:
        listener.close()
    clients: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        clients.append(client_of(Request(scope)))

    config.app = app
    config.load()
    asyncio.run(config.loaded_app(from_address("127.0.0.1").scope, cast(Any, None), cast(Any, None)))
    assert clients == [seen]
