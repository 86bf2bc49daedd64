"""Beam search over HTTP: the answers are those of ``LLM.beam_search``, best first."""

import json
import time
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest

from pagebrain import LLM, BeamSearchParams
from tests.server.support_in_process import ServerThread

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": PROMPT}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BEAMS: dict[str, Any] = {"use_beam_search": True, "n": 3, "max_tokens": 8}


def test_the_answers_are_the_best_outputs_in_order(api: ServerThread, offline: LLM) -> None:
    prompts = [PROMPT, "The dog"]
    for more in ({}, {"length_penalty": 0.0, "early_stopping": True}, {"temperature": 0, "ignore_eos": True}):
        answer = api.post(COMPLETIONS, {"prompt": prompts} | BEAMS | more).json()
        fields = {name: value for name, value in more.items() if name != "temperature"}
        expected = offline.beam_search(prompts, BeamSearchParams(3, 8, **fields))  # type: ignore[arg-type]
        found = [sequence for output in expected for sequence in output.sequences]
        assert [choice["text"] for choice in answer["choices"]] == [sequence.text for sequence in found]
        assert [choice["finish_reason"] for choice in answer["choices"]] == [sequence.finish_reason for sequence in found]
        num_prompt = sum(len(offline.generate(prompt, use_tqdm=False)[0].prompt_token_ids) for prompt in prompts)
        assert answer["usage"]["prompt_tokens"] == num_prompt
        assert answer["usage"]["completion_tokens"] == sum(len(sequence.tokens) for sequence in found) - 3 * num_prompt


def test_a_client_that_leaves_ends_its_search(api: ServerThread) -> None:
    """The answer is not streamed, so that nothing but the connection's end says that the client has gone."""
    body = {"prompt": PROMPT} | BEAMS | {"n": 8, "max_tokens": 200, "ignore_eos": True}
    engine = api.client.engine
    num_steps = api.call(lambda: engine.stats().num_steps)
    api.client.handle.step_s = 0.02
    connection = HTTPConnection(urlsplit(api.url).netloc)
    try:
        connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
        while api.call(lambda: engine.stats().num_running) < 8:
            time.sleep(0.005)
        connection.close()
        api.wait_until_idle()
    finally:
        api.client.handle.step_s = 0.0
    assert api.call(lambda: engine.stats().num_steps) < num_steps + 200, "the search was computed to its end"


def test_a_chat_is_answered_by_beam_search_too(api: ServerThread) -> None:
    answer = api.post(CHAT, {"messages": MESSAGES} | BEAMS).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    best = api.post(CHAT, {"messages": MESSAGES} | BEAMS | {"n": 1}).json()["choices"][0]["message"]["content"]
    greedy = api.post(CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}).json()
    assert best == greedy["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_has_no_meaning_in_beam_search_is_refused_by_name(path: str, api: ServerThread) -> None:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    refused: list[tuple[str, Any]] = [
        *(("stream", True), ("temperature", 0.7), ("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("stop", "a")),
        *(("presence_penalty", 0.5), ("logit_bias", {"5": 1.0}), ("min_tokens", 2), ("stop_token_ids", [5])),
        *([("logprobs", 0), ("logprobs", 1)] if path == COMPLETIONS else [("logprobs", True)]),
        *([("echo", True)] if path == COMPLETIONS else []),
    ]
    for name, value in refused:
        error = api.post(path, asked | BEAMS | {name: value}).json()["error"]
        assert error["param"] == name and "beam search" in error["message"], error
    for name, value in (("length_penalty", 2.0), ("early_stopping", True)):
        error = api.post(path, asked | {name: value}).json()["error"]
        assert error["param"] == name and "needs 'use_beam_search'" in error["message"]
    assert api.post(path, asked | BEAMS | {"n": 129}).status_code == 400


def test_the_engine_says_no_to_more_beams_than_its_vocabulary_can_feed(api: ServerThread, offline: LLM) -> None:
    assert (offline.config.vocab_size or 0) > 2 * 128, "so every width that the server takes can be searched here"
    answer = api.post(COMPLETIONS, {"prompt": PROMPT} | BEAMS | {"n": 128, "max_tokens": 2})
    assert len(answer.json()["choices"]) == 128
