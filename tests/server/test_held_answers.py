"""An answer in one piece, and all of them together, are bounded before they are computed; what is held is given back."""

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.outputs import OutputDelta, TokenLogprobs
from pagebrain.server.api.completions import ChoiceWriter, whole_pieces
from pagebrain.server.api.held import CHAT, COMPLETION, HeldAnswers, held_bytes, json_bytes
from pagebrain.server.api.logprob_json import CompletionScorer, ScoredPrompt, TokenTexts
from pagebrain.server.api.service import Heading
from pagebrain.server.error_responses import ApiError
from pagebrain.server.link.scores import Scores
from pagebrain.server.link.streams import RequestStream
from pagebrain.server.options import ServerOptions
from tests.server.support_in_process import SETTINGS, InProcessClient, ServerThread
from tests.support.slow_client import SlowClient

LONG: dict[str, Any] = {"prompt": [5] * 1000, "echo": True, "logprobs": 20, "n": 12, "max_tokens": 0}
"""Seven megabytes, more than the system's buffers take; 900 kB are held."""

SHORT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def small() -> Iterator[ServerThread]:
    """A server with room for one long answer."""
    with ServerThread(
        LLM(**SETTINGS), max_held_bytes=2**20, max_answer_bytes=32 * 2**20, chat_template=CHAT_TEMPLATE
    ) as server:
        yield server


def held(server: ServerThread) -> int:
    """What the server says that is reserved."""
    lines = server.get("/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("pagebrain:held_answer_bytes")).rpartition(" ")[2]))


def wait_until_nothing_is_held(server: ServerThread) -> None:
    server.wait_until_idle()
    for _ in range(1000):
        if held(server) == 0:
            return
    raise AssertionError(f"{held(server)} bytes are still held")


# Estimates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "lengths", "num_prompts", "shape"),
    [
        (SamplingParams(n=8, logprobs=5), (24, 8 * 1000), 1, COMPLETION),
        (SamplingParams(prompt_logprobs=1), (1023, 1), 256, COMPLETION),
        (SamplingParams(n=16, logprobs=20), (24, 16 * 1000), 1, CHAT),
        (SamplingParams(n=128), (24, 128 * 1000), 8, COMPLETION),
        (SamplingParams(n=64, logprobs=1), (24, 64 * 1000), 1, CHAT),
    ],
    ids=[
        "n 8, logprobs 5",
        "loglikelihood of 256 prompts",
        "chat, n 16, top_logprobs 20",
        "1024 answers",
        "n 64, logprobs 1",
    ],
)
def test_what_users_ask_for_is_within_the_default_bounds(
    params: SamplingParams, lengths: tuple[int, int], num_prompts: int, shape: Any
) -> None:
    options = ServerOptions()
    assert num_prompts * json_bytes(params, *lengths, shape, params.prompt_logprobs is not None) <= options.max_answer_bytes
    assert num_prompts * held_bytes(params, *lengths) <= options.max_held_bytes / 4


@pytest.mark.parametrize("num_top", [None, 1, 20])
@pytest.mark.parametrize("kind", ["completion", "echo", "chat"])
def test_an_answer_is_about_as_long_as_it_was_expected_to_be(kind: str, num_top: int | None, small: ServerThread) -> None:
    if kind == "echo":
        tokens = small.post("/tokenize", {"prompt": "Mia and Juno looked at the old clock in the garden. " * 4}).json()[
            "tokens"
        ]
        answer = small.post(
            "/v1/completions", {"prompt": tokens, "n": 4, "echo": True, "logprobs": num_top, "max_tokens": 0}
        )
        expected = json_bytes(SamplingParams(n=4, prompt_logprobs=num_top), len(tokens), 0, COMPLETION, True)
    else:
        body: dict[str, Any] = {"n": 4, "max_tokens": 60, "ignore_eos": True, "seed": 3}
        body |= {"prompt": "Once"} if kind == "completion" else {"messages": [{"role": "user", "content": "Once"}]}
        if num_top is not None:
            body |= {"logprobs": num_top} if kind == "completion" else {"logprobs": True, "top_logprobs": num_top}
        path = "/v1/completions" if kind == "completion" else "/v1/chat/completions"
        answer = small.post(path, body)
        params = SamplingParams(n=4, logprobs=num_top)
        expected = json_bytes(params, 2, 4 * 60, COMPLETION if kind == "completion" else CHAT, False)
    assert answer.status_code == 200
    assert 0.8 * len(answer.content) - 300 <= expected <= 1.6 * len(answer.content)


# Refused beforehand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG | {"n": 90}),
        ("/v1/completions", LONG | {"prompt": [[5] * 1000] * 3, "n": 24}),
        ("/v1/completions", {"prompt": "Once", "n": 64, "max_tokens": 900, "logprobs": 20}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "n": 20, "logprobs": True, "top_logprobs": 20},
        ),
    ],
    ids=["echo", "several prompts", "generated", "chat without max_tokens"],
)
def test_an_answer_that_could_get_too_long_is_refused_with_figures_before_it_is_queued(
    path: str, body: dict[str, Any], small: ServerThread
) -> None:
    submitted = small.call(lambda: small.client.engine.stats().num_steps)
    answer = small.post(path, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "n"
    for words in ("MiB", "at most 32.0 MiB", "'n'", "'max_tokens'", "'logprobs'", "stream"):
        assert words in error["message"]
    assert small.call(lambda: small.client.engine.stats().num_steps) == submitted, "something was computed"
    assert held(small) == 0


def test_an_answer_of_which_too_much_would_be_held_is_refused_and_can_be_streamed(small: ServerThread) -> None:
    body = {"prompt": "Once", "n": 40, "max_tokens": 100, "stop": ["e"], "logprobs": 20}
    answer = small.post("/v1/completions", body)
    assert answer.status_code == 400
    assert "all answers together may use at most 1.0 MiB" in answer.json()["error"]["message"]
    assert small.post("/v1/completions", body | {"stream": True}).text.endswith("data: [DONE]\n\n")


def test_a_slow_reader_keeps_its_room_and_others_are_told_to_come_back_while_streams_go_on(small: ServerThread) -> None:
    with SlowClient(small.url, "/v1/completions", LONG) as slow:
        assert slow.take()  # it is being sent
        assert held(small) > 700_000
        refused = small.post("/v1/completions", LONG)
        error = refused.json()["error"]
        assert refused.status_code == 503 and error["code"] == "server_busy" and int(refused.headers["retry-after"]) >= 1
        assert "0.9 MiB" in error["message"] and "limit of 1.0 MiB" in error["message"]
        stream = small.post("/v1/completions", LONG | {"stream": True, "n": 1})
        assert stream.text.endswith("data: [DONE]\n\n")
        assert small.post("/v1/completions", SHORT).status_code == 200, "there is room for a short one"
    wait_until_nothing_is_held(small)
    answer = small.post("/v1/completions", LONG)
    assert len(answer.content) > 6_000_000, "the slow reader's answer may have been in the system's buffers as a whole"
    choices = answer.json()["choices"]
    assert len(choices) == 12 and all(choice["logprobs"] == choices[0]["logprobs"] for choice in choices)
    wait_until_nothing_is_held(small)


def _leave(server: ServerThread) -> None:
    server.client.handle.step_s = 0.02
    try:
        with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
            client.post(server.url + "/v1/completions", json=SHORT | {"max_tokens": 900, "ignore_eos": True})
    finally:
        server.client.handle.step_s = 0.0


def _is_refused_by_the_queue(server: ServerThread) -> None:
    def full(num_requests: int, num_tokens: int, source: str | None = None) -> None:
        raise ApiError(503, "full")

    admission = server.client.admission
    admission.check = full  # type: ignore[method-assign]
    try:
        assert server.post("/v1/completions", SHORT).status_code == 503
    finally:
        del admission.check


@pytest.mark.parametrize("how", [_leave, _is_refused_by_the_queue], ids=["the client leaves", "the queue is full"])
def test_room_is_given_back_however_a_request_ends(how: Callable[[ServerThread], None], small: ServerThread) -> None:
    how(small)
    wait_until_nothing_is_held(small)


# The ledger -----------------------------------------------------------------------------------------------------------


def test_a_hold_takes_more_when_its_answer_is_longer_and_gives_all_back() -> None:
    answers = HeldAnswers(1000)
    first, second = answers.hold(300), answers.hold(500)
    first.use(200)
    assert answers.num_bytes == 800
    first.use(200)
    assert (first.num_bytes, answers.num_bytes) == (400, 900)
    with pytest.raises(ApiError, match="try again later") as refused:
        first.use(200)
    assert refused.value.status_code == 503 and answers.num_bytes == 900
    second.use(100)
    second.fit()
    assert (second.num_bytes, answers.num_bytes) == (100, 500)
    for hold in (first, second, first):
        hold.close()
    assert answers.num_bytes == 0


def test_more_than_is_ever_held_is_a_mistake_and_more_than_is_free_is_not() -> None:
    answers = HeldAnswers(1000)
    with pytest.raises(ApiError) as never:
        answers.hold(1001)
    answers.hold(600)
    with pytest.raises(ApiError) as later:
        answers.hold(401)
    assert (never.value.status_code, later.value.status_code) == (400, 503)
    assert answers.hold(400).num_bytes == 400 and answers.num_bytes == 1000


def test_what_an_answer_takes_is_counted_as_it_comes() -> None:
    async def scenario() -> None:
        stream = RequestStream("r", (1, 2), SamplingParams(n=2), lambda _: None)
        used: list[int] = []
        reading = asyncio.ensure_future(stream.read_all(used.append))
        for index, text in ((0, "abc"), (1, "é")):
            stream.put(OutputDelta("r", index, text, (5,)), 0.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for index in (0, 1):
            stream.put(OutputDelta("r", index, "", (6,), finish_reason="length"), 0.0)
        assert [answer.text for answer in await reading] == ["abc", "é"]
        assert used == [7, 6, 8]

    asyncio.run(scenario())


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_long_answer_is_written_without_ever_being_there_as_a_whole() -> None:
    prompt = tuple(range(500))
    top = tuple((token_id, -0.1234567890123 * token_id) for token_id in range(20))
    scores = Scores.pack([None, *(TokenLogprobs(token_id, -1.5, 3, top) for token_id in prompt[1:])])
    stream = RequestStream("r", prompt, SamplingParams(n=30, prompt_logprobs=20), lambda _: None)
    shared = ScoredPrompt(prompt, 30)
    texts = TokenTexts(None)
    writers = [ChoiceWriter(index, shared, "", CompletionScorer(texts, True)) for index in range(30)]
    samples = [OutputDelta("r", index, "", (5,), finish_reason="length") for index in range(30)]
    samples[0] = samples[0]._replace(prompt_logprobs=scores)
    tracemalloc.start()
    try:
        num_bytes = sum(len(piece) for piece in whole_pieces(Heading.new("cmpl", "m"), [stream], writers, [samples]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes > 9_000_000
    assert peak < num_bytes / 10, "more than the prompt's share of it was there at a time"


def test_streams_share_a_bound_and_the_one_with_most_waiting_ends(offline: LLM) -> None:
    async def scenario() -> None:
        client = InProcessClient(offline, ServerOptions(max_held_bytes=2**20))
        client.handle.submit = client.handle.abort = lambda _: None  # type: ignore[method-assign,assignment]
        params = SamplingParams(n=4, logprobs=20)
        slow, quick = (client.submit([5, 6], params, name) for name in ("slow", "quick"))
        top = tuple((token_id, -1.0) for token_id in range(20))
        delta = OutputDelta("slow", 0, "a", (5,), Scores.pack([TokenLogprobs(5, -1.0, 1, top)]))
        quick.put(delta._replace(request_id="quick"), 0.0)
        num_put = 0
        while not slow.is_broken:
            assert num_put < 4000, "the bound of a single stream came first"
            client.on_step([delta] * 16, client.stats)
            num_put += 16
        assert num_put * 656 > 2**20 and client.num_streams == 1 and not quick.is_broken
        with pytest.raises(Exception, match="bytes were waiting"):
            await slow.read()
        assert [piece.text for piece in await quick.read()] == ["a"]
        assert client.backlog.num_bytes == 0

    asyncio.run(scenario())
