"""Log-probabilities as OpenAI shows them: the engine's numbers, with each token's text and its place in the answer."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebrain import LLM, SamplingParams
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.outputs import OutputDelta, TokenLogprobs
from pagebrain.server.api.completions import ChoiceWriter, CompletionEvents
from pagebrain.server.api.logprob_json import LOWEST_LOGPROB, CompletionScorer, ScoredPrompt, TokenTexts
from pagebrain.server.api.protocol import StreamOptions
from pagebrain.server.api.service import Heading
from pagebrain.server.link.streams import RequestStream
from tests.server.support_in_process import ServerThread
from tests.support.tokenizers import byte_tokenizer

SAMPLED: dict[str, Any] = {"temperature": 1.2, "seed": 11, "max_tokens": 16}
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def client(api: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _ask(api: ServerThread, stream: bool, **body: Any) -> list[dict[str, Any]]:
    """The choices of an answer; a stream's pieces are put together."""
    if not stream:
        choices: list[dict[str, Any]] = api.post("/v1/completions", body).json()["choices"]
        return choices
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        events = client.completions.create(**({"model": "storyteller"} | body), stream=True)
        pieces = [event.choices[0].model_dump() for event in events]
    joined: list[dict[str, Any]] = []
    for index in range(1 + max(piece["index"] for piece in pieces)):
        own = [piece for piece in pieces if piece["index"] == index]
        lists = {name: [item for piece in own for item in (piece["logprobs"] or {}).get(name, [])] for name in LISTS}
        text = "".join(piece["text"] for piece in own)
        joined.append({"text": text, "logprobs": lists, "finish_reason": own[-1]["finish_reason"]})
    return joined


def _token(offline: LLM, token_id: int) -> str:
    assert offline.engine.detokenizer is not None
    return offline.engine.detokenizer.token_bytes(token_id, skip_special_tokens=False).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_they_are_the_engines(count: int, stream: bool, api: ServerThread, offline: LLM) -> None:
    [output] = offline.generate("The old clock", SamplingParams(**SAMPLED, logprobs=count), use_tqdm=False)
    expected = output.outputs[0].logprobs
    assert expected is not None
    [choice] = _ask(api, stream, prompt="The old clock", logprobs=count, **SAMPLED)
    got = choice["logprobs"]
    assert got["tokens"] == [_token(offline, score.token_id) for score in expected]
    assert got["token_logprobs"] == pytest.approx([score.logprob for score in expected], abs=1e-9)
    for token, own, top, score in zip(got["tokens"], got["token_logprobs"], got["top_logprobs"], expected, strict=True):
        best = [_token(offline, token_id) for token_id, _ in score.top]
        assert list(top) == best + [token] * (token not in best)
        assert top[token] == own
        assert list(top.values())[: len(best)] == pytest.approx([logprob for _, logprob in score.top], abs=1e-9)
    assert any(len(top) == count + 1 for top in got["top_logprobs"]), "the chosen token was always among the best"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_with_echo_the_prompts_come_first(n: int, stream: bool, api: ServerThread, offline: LLM) -> None:
    params = SamplingParams(**SAMPLED, logprobs=1, prompt_logprobs=1, n=n)
    prompts = ["The old clock was", "Mia and Juno"]
    outputs = offline.generate(prompts, params, use_tqdm=False)
    choices = _ask(api, stream, prompt=prompts, logprobs=1, echo=True, n=n, **SAMPLED)
    expected = [(output, sample) for output in outputs for sample in output.outputs]
    for choice, (output, sample) in zip(choices, expected, strict=True):
        assert output.prompt_logprobs is not None and sample.logprobs is not None
        got = choice["logprobs"]
        assert choice["text"] == f"{output.prompt}{sample.text}"
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        numbers = [score.logprob for score in (*output.prompt_logprobs[1:], *sample.logprobs) if score is not None]
        assert got["token_logprobs"][1:] == pytest.approx(numbers, abs=1e-9)
        assert got["tokens"] == [_token(offline, token) for token in output.prompt_token_ids + sample.token_ids]
        for token, offset in zip(got["tokens"], got["text_offset"], strict=True):
            assert choice["text"][offset : offset + len(token)] == token


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored_without_generating_anything(stream: bool, api: ServerThread, offline: LLM) -> None:
    prompts = ["Once upon a time", "é🙂!"]
    outputs = offline.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)
    choices = _ask(api, stream, prompt=prompts, logprobs=2, echo=True, max_tokens=0)
    for prompt, output, choice in zip(prompts, outputs, choices, strict=True):
        assert output.prompt_logprobs is not None
        assert choice["text"] == prompt and choice["finish_reason"] == "length"
        expected = [None if score is None else pytest.approx(score.logprob) for score in output.prompt_logprobs]
        assert choice["logprobs"]["token_logprobs"] == expected
    body = {"prompt": prompts, "echo": True, "max_tokens": 0}
    assert api.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 0


def test_samples_that_come_before_their_prompts_scores_wait_for_them() -> None:
    params = SamplingParams(n=2, logprobs=0, prompt_logprobs=0)
    stream = RequestStream("r", (1, 2), params, lambda _: None)

    def make() -> CompletionEvents:
        scorers = [CompletionScorer(TokenTexts(None), skip_special_tokens=True) for _ in range(2)]
        prompt = ScoredPrompt((1, 2), num_samples=2)
        writers = [ChoiceWriter(index, prompt, "ab", scorer) for index, scorer in enumerate(scorers)]
        return CompletionEvents(Heading.new("cmpl", "m"), [stream], writers, StreamOptions())

    def delta(index: int, token: int, **more: Any) -> OutputDelta:
        return OutputDelta("r", index, f"<{token}>", (token,), (TokenLogprobs(token, -1.0, 1),), **more)

    def told(pieces: Iterable[str]) -> list[tuple[int, str, list[str] | None]]:
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in "".join(pieces).split("\n\n")[:-1]]
        return [(choice["index"], choice["text"], (choice["logprobs"] or {}).get("tokens")) for choice in choices]

    prompt, scores = ["token_id:1", "token_id:2"], (None, TokenLogprobs(2, -2.0, 1))
    events = make()
    assert events.tell(0, [delta(1, 5)]) == "" == events.tell(0, [delta(1, 6)])
    assert told(events.tell(0, [delta(0, 7, prompt_logprobs=scores)])) == [
        (1, "ab<5>", [*prompt, "token_id:5"]),
        (1, "<6>", ["token_id:6"]),
        (0, "ab<7>", [*prompt, "token_id:7"]),
    ]
    assert told(events.tell(0, [delta(1, 8)])) == [(1, "<8>", ["token_id:8"])]

    events = make()  # a server that ends may have to do without
    assert events.tell(0, [delta(1, 5)]) == ""
    aborted = [OutputDelta("r", index, "", (), finish_reason="abort") for index in range(2)]
    assert [text for _, text, _ in told(events.tell(0, aborted))] == ["ab<5>", "ab", ""]


def test_a_part_of_a_character_is_written_as_bytes_and_stands_where_the_character_does() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé🙂z")
    scorer = CompletionScorer(TokenTexts(Detokenizer(tokenizer)), skip_special_tokens=True)
    scores = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
    first, second = scorer.answer(ids[:5], scores[:5]), scorer.answer(ids[5:], scores[5:])
    emoji = [f"bytes:\\x{byte:02x}" for byte in "🙂".encode()]
    assert first["tokens"] + second["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", *emoji, "z"]
    assert first["text_offset"] + second["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_an_unfinished_character_of_the_prompt_does_not_run_into_the_answer() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("🙂")
    texts = TokenTexts(Detokenizer(tokenizer))
    scorer = CompletionScorer(texts, skip_special_tokens=True)
    scores = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
    text = texts.decode(ids[:2])
    assert scorer.prompt(ids[:2], scores[:2])["text_offset"] == [0, 0]
    assert scorer.answer(ids, scores)["text_offset"] == [len(text)] * 4
    assert scorer.answer([65], scores[:1])["text_offset"] == [len(text) + 1]


def _first_bytes(data: bytes) -> list[int]:
    """Where each character of ``data``, or what stands for broken bytes in it, begins."""
    starts: list[int] = []
    at = 0
    while at < len(data):
        starts.append(at)
        try:
            at += len(data[at:].decode()[0].encode())
        except UnicodeDecodeError as error:
            at += error.end if error.start == 0 else len(data[at : at + error.start].decode()[0].encode())
    return starts


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"a", b"\x80", b"\xc3", b"\xa9", b"\xe2\x82", b"\xef\xbf", b"\xbd", b"\xf0\x9f", b"\x99\x82z", b""])
    )
)
def test_offsets_count_the_characters_that_are_sent_broken_bytes_included(pieces: list[bytes]) -> None:
    class Pieces:
        def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
            return pieces[token_id]

        def decode(self, token_ids: Iterable[int], skip_special_tokens: bool) -> str:
            return b"".join(pieces[token_id] for token_id in token_ids).decode(errors="replace")

    ids = list(range(len(pieces)))
    texts = TokenTexts(Pieces())  # type: ignore[arg-type]
    scores = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
    sent = texts.decode(ids)
    scorer = CompletionScorer(texts, skip_special_tokens=True)
    offsets = scorer.answer(ids[:3], scores[:3])["text_offset"] + scorer.answer(ids[3:], scores[3:])["text_offset"]
    echoed = CompletionScorer(texts, skip_special_tokens=True)
    assert echoed.prompt(ids, scores)["text_offset"] == offsets
    starts = _first_bytes(b"".join(pieces))
    assert len(starts) == len(sent)
    place = 0
    for piece, offset in zip(pieces, offsets, strict=True):
        if piece:
            assert offset == max(index for index, start in enumerate(starts) if start <= place)
        assert 0 <= offset <= len(sent)
        place += len(piece)
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_broken_bytes_has_their_offsets(stream: bool, api: ServerThread, offline: LLM) -> None:
    assert offline.engine.detokenizer is not None and offline.tokenizer is not None
    by_bytes = {offline.engine.detokenizer.token_bytes(token_id): token_id for token_id in range(2048)}
    ids = [by_bytes[piece] for piece in (b"a", b"\xf0", b"b", b"\xe2", b"\xe2", b"\x82", b"\xac", b"c", b"\xf0", b"\x9f")]
    [choice] = _ask(api, stream, prompt=ids, logprobs=0, echo=True, max_tokens=2, temperature=0)
    assert choice["text"].startswith("a\ufffdb\ufffd€c\ufffd")
    assert choice["logprobs"]["text_offset"][:11] == [0, 1, 2, 3, 4, 4, 4, 5, 6, 6, 7]
    assert choice["logprobs"]["tokens"][1] == "bytes:\\xf0"


def test_special_tokens_take_up_room_only_where_they_are_shown() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(Detokenizer(tokenizer))
    end, a = 256, tokenizer.encode("a")[0]
    scores = [TokenLogprobs(token_id, -1.0, 1) for token_id in (end, a)]
    for skip, offset in ((True, 0), (False, len("<|endoftext|>"))):
        part = CompletionScorer(texts, skip_special_tokens=skip).answer([end, a], scores)
        assert part["tokens"] == ["<|endoftext|>", "a"] and part["text_offset"] == [0, offset]
    shown = CompletionScorer(texts, skip_special_tokens=True).prompt([end, a], scores)
    assert shown["text_offset"] == [0, len("<|endoftext|>")], "an echo shows them"


def test_what_json_cannot_say_is_a_very_low_number() -> None:
    scorer = CompletionScorer(TokenTexts(None), skip_special_tokens=True)
    part = scorer.answer([5], [TokenLogprobs(5, float("-inf"), 9, ((3, -0.5), (5, float("-inf"))))])
    assert part["tokens"] == ["token_id:5"] and part["token_logprobs"] == [LOWEST_LOGPROB]
    assert part["top_logprobs"] == [{"token_id:3": -0.5, "token_id:5": LOWEST_LOGPROB}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_tokens_have_their_bytes(stream: bool, client: Any, offline: LLM) -> None:
    messages: Any = [{"role": "user", "content": "Tell me"}]
    answer = client.chat.completions.create(
        model="storyteller", messages=messages, logprobs=True, top_logprobs=2, stream=stream, **SAMPLED
    )
    if stream:
        content = [entry for event in answer for c in event.choices if c.logprobs for entry in c.logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    params = SamplingParams(**SAMPLED, logprobs=2)
    [output] = offline.generate("user: Tell me\nassistant:", params, use_tqdm=False)
    assert output.outputs[0].logprobs is not None
    for entry, score in zip(content, output.outputs[0].logprobs, strict=True):
        assert entry.token == _token(offline, score.token_id) and bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(score.logprob, abs=1e-9)
        assert [top.token for top in entry.top_logprobs] == [_token(offline, token_id) for token_id, _ in score.top]


def test_a_chat_without_top_logprobs_has_the_chosen_tokens_only(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Tell me"}]
    answer = client.chat.completions.create(model="storyteller", messages=messages, logprobs=True, max_tokens=2)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], []]
