"""Bodies as clients write them: what asks for nothing is as good as left out, what would change the answer is refused."""

import json
from typing import Any

import openai
import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.server.api.defaults import DEFAULTS
from pagebrain.server.api.protocol import ChatRequest, CompletionRequest
from pagebrain.server.api.service import Service
from pagebrain.server.error_responses import ApiError
from pagebrain.server.options import ServerOptions
from tests.server.client_bodies import BODIES, CHAT, COMPLETIONS
from tests.server.support_in_process import ServerThread

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "user", "content": "Tell me"}]


def _events(api: ServerThread, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream without its ``[DONE]``."""
    answer = api.post(path, body | {"stream": True})
    assert answer.status_code == 200, answer.text
    *events, done = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


# Whole bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", BODIES)
def test_a_body_as_a_client_sends_it_is_served(client: str, api: ServerThread) -> None:
    path, body = BODIES[client]
    if not body.get("stream"):
        answer = api.post(path, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1
        return
    events = _events(api, path, body)
    assert any(choice["finish_reason"] for event in events for choice in event["choices"])
    if (body.get("stream_options") or {}).get("include_usage"):
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_all_defaults_together_change_nothing(path: str, api: ServerThread) -> None:
    asked = GREEDY | ({"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES})
    plain = api.post(path, asked).json()["choices"]
    own = (CompletionRequest if path == COMPLETIONS else ChatRequest).model_fields
    for which in (0, -1):
        defaults = {name: values[which] for name, values in DEFAULTS.items() if name not in own}
        assert len(defaults) > 40
        answer = api.post(path, defaults | asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain


OTHER_VALUES: list[tuple[str, Any, str]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}], "only as [], got"),
    ("tool_choice", "required", 'only as "none" or "auto", got \'required\''),
    ("function_call", {"name": "f"}, 'only as "none" or "auto"'),
    ("response_format", {"type": "json_object"}, 'only as {"type": "text"}'),
    ("response_format", {"type": "text", "strict": True}, 'only as {"type": "text"}'),
    ("service_tier", "flex", 'only as "auto" or "default"'),
    ("store", True, "only as false"),
    ("store", 0, "only as false"),
    ("modalities", ["text", "audio"], 'only as ["text"]'),
    ("reasoning_effort", "high", 'only as "none"'),
    ("verbosity", "low", 'only as "medium"'),
    ("priority", 1, "only as 0"),
    ("priority", False, "only as 0"),
    ("bad_words", ["x"], "only as []"),
    ("add_generation_prompt", False, "only as true"),
    ("guided_json", {}, "not supported"),
    ("allowed_token_ids", [], "not supported"),
    ("truncate_prompt_tokens", 5, "not supported"),
    ("regex", "a", "not supported"),
    ("audio", {"voice": "x"}, "not supported"),
    ("never_heard_of", False, "not supported"),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("name", "value", "words"), OTHER_VALUES, ids=lambda value: str(value)[:30])
def test_another_value_is_refused_with_what_is_supported(
    name: str, value: Any, words: str, path: str, api: ServerThread
) -> None:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    answer = api.post(path, asked | {name: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert words in error["message"] and error["message"].endswith(": leave it out"), error


@pytest.mark.parametrize(("name", "value"), [("suffix", "the end"), ("max_completion_tokens", -1)])
def test_what_a_completion_cannot_do_is_refused(name: str, value: Any, api: ServerThread) -> None:
    answer = api.post(COMPLETIONS, {"prompt": PROMPT, name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name


def test_the_schema_says_what_asks_for_nothing(api: ServerThread) -> None:
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        by_name = {
            field: values["enum"]
            for pattern, values in schemas[name]["patternProperties"].items()
            for field in pattern.removeprefix("^(").removesuffix(")$").split("|")
        }
        assert by_name["tools"] == [[], None] and by_name["tool_choice"] == ["none", "auto", None]
        assert ("echo" in by_name) == (name == "ChatRequest"), "a completion has a field of its own of that name"
        assert len(by_name) > 40 and not by_name.keys() & schemas[name]["properties"].keys()


# Single fields ---------------------------------------------------------------------------------------------------------


def test_an_empty_stop_string_stops_nothing(api: ServerThread) -> None:
    plain = api.post(COMPLETIONS, GREEDY | {"prompt": PROMPT}).json()["choices"]
    stops: list[Any] = ["", [], None]
    for stop in stops:
        assert api.post(COMPLETIONS, GREEDY | {"prompt": PROMPT, "stop": stop}).json()["choices"] == plain


def test_a_completions_limit_has_two_names(api: ServerThread) -> None:
    asked = {"prompt": PROMPT, "ignore_eos": True}
    for limits in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}):
        assert api.post(COMPLETIONS, asked | limits).json()["usage"]["completion_tokens"] == 3
    scored = api.post(COMPLETIONS, asked | {"max_completion_tokens": 0, "echo": True}).json()
    assert scored["choices"][0]["text"] == PROMPT and scored["usage"]["completion_tokens"] == 0


def test_a_clients_request_id_is_in_the_answers_id(api: ServerThread) -> None:
    for path, prefix, asked in ((COMPLETIONS, "cmpl", {"prompt": PROMPT}), (CHAT, "chatcmpl", {"messages": MESSAGES})):
        assert api.post(path, GREEDY | asked | {"request_id": "mine"}).json()["id"] == f"{prefix}-mine"
        assert {event["id"] for event in _events(api, path, GREEDY | asked | {"request_id": "mine"})} == {f"{prefix}-mine"}


def test_the_newer_name_of_the_user_counts_too(api: ServerThread) -> None:
    for fields, user in (
        ({"safety_identifier": "hash"}, "hash"),
        ({"user": "ada", "safety_identifier": "hash"}, "ada"),
        ({"user": ""}, None),
    ):
        body = CompletionRequest.model_validate({"prompt": PROMPT} | fields)
        assert body.end_user == user


def test_the_name_in_a_message_goes_to_the_template() -> None:
    template = "{% for m in messages %}{{ m.name if 'name' in m else '-' }}:{{ m.content }} {% endfor %}"
    messages = [
        {"role": "user", "content": "Hi", "name": "ada"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Ha", "name": None},
    ]
    with ServerThread(chat_template=template) as server:
        tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "ada:Hi -:Ho -:Ha "
        chat = server.post(CHAT, GREEDY | {"messages": messages}).json()
        text = server.post(COMPLETIONS, GREEDY | {"prompt": "ada:Hi -:Ho -:Ha "}).json()
        assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]
        assert chat["usage"] == text["usage"]


# Usage in every event --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"n": 3}, {"n": 3, "echo": True, "logprobs": 0}], ids=str)
def test_each_event_of_a_completion_counts_its_answers_tokens(more: dict[str, Any], api: ServerThread) -> None:
    prompts = ["Once upon a time", "The old clock was"]
    asked = GREEDY | {"prompt": prompts, "ignore_eos": True} | more
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = _events(api, COMPLETIONS, asked | {"stream_options": options})
    lengths = [len(api.post("/tokenize", {"prompt": prompt}).json()["tokens"]) for prompt in prompts]
    n, counts = more.get("n", 1), dict[int, list[int]]()
    for event in events:
        [choice], usage = event["choices"], event["usage"]
        assert usage["prompt_tokens"] == lengths[choice["index"] // n]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counts.setdefault(choice["index"], []).append(usage["completion_tokens"])
    assert sorted(counts) == list(range(2 * n)) and len(events) > 2 * n, "the tokens came in one piece"
    assert all(count == sorted(set(count)) and count[-1] == 6 for count in counts.values()), counts
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6 * 2 * n
    assert last["usage"]["prompt_tokens"] == sum(lengths)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_each_event_of_a_chat_counts_its_answers_tokens(logprobs: bool, n: int, api: ServerThread) -> None:
    asked = GREEDY | {"messages": MESSAGES, "n": n, "logprobs": logprobs, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = _events(api, CHAT, asked | {"stream_options": options})
    counts = dict[int, list[int]]()
    for event in events:
        [choice], usage = event["choices"], event["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert "role" not in choice["delta"] or usage["completion_tokens"] == 0, "the role is no token"
        counts.setdefault(choice["index"], []).append(usage["completion_tokens"])
    assert sorted(counts) == list(range(n)) and len(events) > 3 * n, "the tokens came in one piece"
    assert all(count == sorted(count) and count[-1] == 6 for count in counts.values()), counts
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6 * n


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_each_event_needs_no_last_one(path: str, api: ServerThread) -> None:
    asked = GREEDY | ({"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES})
    events = _events(api, path, asked | {"stream_options": {"continuous_usage_stats": True}})
    assert all(event["choices"] and event["usage"] for event in events)
    assert events[-1]["usage"]["completion_tokens"] == 6


def test_openais_client_reads_usage_from_each_event(api: ServerThread) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="storyteller", prompt=PROMPT, stream=True, stream_options=options, **GREEDY)
        counts = [event.usage.completion_tokens for event in stream if event.usage is not None]
    assert counts == sorted(counts) and len(counts) > 2 and counts[-1] == 6


# A full context --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_scored(stream: bool, api: ServerThread, offline: LLM) -> None:
    ids = [(7 * position) % 2000 for position in range(1024)]
    shorter = SamplingParams(max_tokens=1, prompt_logprobs=2)
    [expected] = offline.generate(ids[:1023], shorter, use_tqdm=False)
    [last] = offline.generate(ids[:1023], SamplingParams(temperature=0, max_tokens=1, logprobs=2), use_tqdm=False)
    assert expected.prompt_logprobs is not None and last.outputs[0].logprobs is not None
    asked = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 0}
    if stream:
        *events, final = _events(api, COMPLETIONS, asked | {"stream_options": {"include_usage": True}})
        [choice] = [choice for event in events for choice in event["choices"]]
        usage = final["usage"]
    else:
        answer = api.post(COMPLETIONS, asked)
        assert answer.status_code == 200, answer.text
        [choice], usage = answer.json()["choices"], answer.json()["usage"]
    logprobs = choice["logprobs"]
    assert [len(values) for values in logprobs.values()] == [1024] * 4
    numbers = [score.logprob for score in expected.prompt_logprobs[1:] if score is not None]
    assert logprobs["token_logprobs"][1:1023] == pytest.approx(numbers, abs=1e-9)
    best = sorted(logprobs["top_logprobs"][1023].values(), reverse=True)[:2]
    assert best == pytest.approx([logprob for _, logprob in last.outputs[0].logprobs[0].top], abs=1e-9)
    assert choice["finish_reason"] == "length"
    counts = {"prompt_tokens": 1024, "completion_tokens": 0, "total_tokens": 1024}
    assert usage == counts | {"prompt_tokens_details": {"cached_tokens": 0}}  # scores of a prompt need all of it
    api.wait_until_idle()


def test_more_than_the_context_is_not_scored(api: ServerThread) -> None:
    answer = api.post(COMPLETIONS, {"prompt": [5] * 1025, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert answer.status_code == 400 and "at most 1024 (max_model_len) can be scored" in answer.json()["error"]["message"]


def test_a_request_that_only_scores_is_not_counted_as_if_it_generated(api: ServerThread) -> None:
    service, prompts = Service(api.client, ServerOptions()), [[5] * 60] * 16
    service._check_size(prompts, SamplingParams(max_tokens=0, n=64, prompt_logprobs=20))
    with pytest.raises(ApiError, match="at most 2000000"):
        service._check_size(prompts, SamplingParams(max_tokens=None, n=64, prompt_logprobs=20))
