"""The routes beside OpenAI's two: ``/generate``, the tokenizer, what is served and how it does."""

import json
import time
from typing import Any

import httpx
import openai
import pytest

import pagebrain
from pagebrain import LLM, SamplingParams
from pagebrain.server.api import tokens
from tests.server.support_in_process import ServerThread


def _events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({"max_new_tokens": 12}, {"temperature": 0}),
        ({"max_new_tokens": 12, "method": "greedy"}, {"temperature": 0}),
        ({"max_new_tokens": 12, "method": "top_k", "top_k": 1}, {"temperature": 0}),
        ({"max_new_tokens": 12, "method": "top_p", "top_p": 1e-9, "temperature": 2.0}, {"temperature": 0}),
    ],
)
def test_generate_streams_start_tokens_and_end(
    body: dict[str, Any], params: dict[str, Any], api: ServerThread, offline: LLM
) -> None:
    answer = api.post("/generate", {"prompt": "Once upon a time"} | body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = _events(answer.text)
    [output] = offline.generate("Once upon a time", SamplingParams(max_tokens=12, **params), use_tqdm=False)
    assert len({event["request_id"] for event in events}) == 1
    assert events[0] == {"event": "start", "request_id": events[0]["request_id"]}
    assert events[-1] == {"event": "end", "request_id": events[0]["request_id"], "finish_reason": "length"}
    tokens = events[1:-1]
    assert {event["event"] for event in tokens} == {"token"} and len(tokens) > 3
    assert [token for event in tokens for token in event["token_ids"]] == list(output.outputs[0].token_ids)
    assert "".join(event["text"] for event in tokens) == output.outputs[0].text


def test_generate_samples_when_told_to(api: ServerThread) -> None:
    for settings in ({"method": "top_p"}, {"method": "top_k"}, {"method": "top_k", "temperature": 1.5, "top_k": 20}):
        texts = set()
        for _ in range(2):
            answer = api.post("/generate", {"prompt": "Once", "max_new_tokens": 12} | settings)
            texts.add("".join(event.get("text", "") for event in _events(answer.text)))
        assert len(texts) > 1, f"{settings} gave the same text twice"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"method": "greedy", "temperature": 1.0}, "temperature"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"method": "top_p", "top_k": 5}, "top_k"),
        ({"method": "top_k", "top_p": 0.5}, "top_p"),
        ({"method": "beam"}, "method"),
        ({"method": "top_k", "top_k": 0}, "top_k"),
        ({"method": "top_p", "temperature": 0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ],
    ids=str,
)
def test_generate_refuses_what_its_method_does_not_use(body: dict[str, Any], param: str, api: ServerThread) -> None:
    answer = api.post("/generate", {"prompt": "Once"} | body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and param in error["message"]


def test_tokenize_and_detokenize_are_each_others_inverse(api: ServerThread, offline: LLM) -> None:
    assert offline.tokenizer is not None
    for text in ("Once upon a time <|endoftext|> é🙂", "", "word " * 2000):
        answer = api.post("/tokenize", {"prompt": text}).json()
        assert answer["tokens"] == offline.tokenizer.encode(text)
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 1024
        assert api.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_a_chat_is_tokenized_as_the_template_writes_it(api: ServerThread, offline: LLM) -> None:
    assert offline.tokenizer is not None
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "storyteller"}
    assert api.post("/tokenize", body).json()["tokens"] == offline.tokenizer.encode("user: Hi\nassistant:")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
        ("/tokenize", {"prompt": None}, 400),
        ("/tokenize", {"prompt": ["x"]}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, 400),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": [2048]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [1.0]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
        ("/detokenize", {"tokens": [0] * 65_537}, 400),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_tokenizer_routes_refuse_what_they_do_not_understand(
    path: str, body: dict[str, Any], status: int, api: ServerThread
) -> None:
    answer = api.post(path, body)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_model_is_listed_under_its_served_name() -> None:
    with ServerThread(served_model_name="openai-community/gpt2") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            [model] = client.models.list().data
            assert (model.id, model.owned_by, model.object) == ("openai-community/gpt2", "pagebrain", "model")
            assert client.models.retrieve("openai-community/gpt2") == model
            answer = client.completions.create(model="openai-community/gpt2", prompt="Once", max_tokens=1)
            assert answer.model == "openai-community/gpt2"
            with pytest.raises(openai.NotFoundError) as refused:
                client.models.retrieve("gpt2")
            assert refused.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError) as refused:
                client.completions.create(model="storyteller", prompt="Once")
            assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_health_and_version_answer(api: ServerThread) -> None:
    assert (api.get("/health").status_code, api.get("/health").json()) == (200, {"status": "ok"})
    assert api.get("/version").json() == {"version": pagebrain.__version__}


def test_health_can_be_asked_for_without_its_body(api: ServerThread) -> None:
    answer = httpx.head(f"{api.url}/health")
    assert answer.status_code == 200 and not answer.content
    with ServerThread() as server:
        server.call(server.client.begin_drain)
        answer = httpx.head(f"{server.url}/health")
        assert answer.status_code == 503 and not answer.content


def test_an_engine_that_says_nothing_for_long_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_SILENCE_S", 0.2)
    with ServerThread() as server:
        time.sleep(0.3)
        assert server.get("/health").status_code == 200, "it had nothing to say"
        server.client.handle.step_s = 0.02
        with httpx.stream("POST", f"{server.url}/generate", json={"prompt": "Once", "max_new_tokens": 900}) as response:
            lines, until = response.iter_lines(), time.monotonic() + 0.5
            while time.monotonic() < until:
                next(lines)
            assert server.get("/health").status_code == 200, "it speaks all the time"
            server.client.handle.step_s = 3600
            time.sleep(0.5)
            answer = server.get("/health")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_silent"
            server.client.handle.paused = True
            assert server.get("/health").status_code == 200, "it has been told to stand still"
        server.client.handle.paused = False
        server.wait_until_idle()
        assert server.get("/health").status_code == 200


def test_pages_that_load_scripts_from_elsewhere_are_off(api: ServerThread) -> None:
    assert [api.get(path).status_code for path in ("/docs", "/redoc", "/docs/oauth2-redirect")] == [404] * 3


def test_the_schema_names_what_is_answered_and_bounds_what_is_taken(api: ServerThread) -> None:
    schema = api.get("/openapi.json").json()
    paths, models = schema["paths"], schema["components"]["schemas"]
    assert {"/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/metrics"} <= set(paths)
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = paths[path]["post"]["responses"]
        assert set(answers) == {"200", "400", "403", "404", "408", "413", "415", "503"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(paths["/generate"]["post"]["responses"]["200"]["content"]) == {"text/event-stream"}
    for name in ("CompletionRequest", "ChatRequest", "GenerateRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert models[name]["additionalProperties"] == {"type": "null"}
    fields = models["CompletionRequest"]["properties"]
    assert {"type": "integer", "maximum": 128, "minimum": 1} in fields["n"]["anyOf"]
    assert models["CompletionRequest"]["required"] == ["prompt"]
    assert "HTTPValidationError" not in models and "securitySchemes" not in schema["components"]


def test_the_schema_asks_for_the_key_where_one_is_needed() -> None:
    with ServerThread(api_key="secret") as server:
        schema = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models").status_code == 401
    assert "401" in schema["paths"]["/v1/completions"]["post"]["responses"]
    assert "401" not in schema["paths"]["/health"]["get"]["responses"]
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
