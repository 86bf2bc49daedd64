"""Whatever a client sends, it gets one clear sentence in OpenAI's shape, and the server goes on as before."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pagebrain.server.api.prompts import PromptReader
from tests.server.support_in_process import ServerThread

BIG = 10**400


@pytest.fixture(autouse=True)
def _untouched(api: ServerThread) -> Iterator[None]:
    """After each mistake the server answers, and nothing of it is left in the engine."""
    yield
    assert api.get("/health").status_code == 200
    api.wait_until_idle()


def _error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert 10 < len(error["message"]) < 700 and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "non-empty"),
        ({"prompt": []}, "prompt", "non-empty"),
        ({"prompt": [[]]}, "prompt", "non-empty lists"),
        ({"prompt": ["x", ""]}, "prompt", "non-empty strings"),
        ({"prompt": ["x", [1]]}, "prompt", "strings only"),
        ({"prompt": [[1], "x"]}, "prompt", "lists of token ids"),
        ({"prompt": [1, "x"]}, "prompt", "integers from 0"),
        ({"prompt": [1, -1]}, "prompt", "integers from 0"),
        ({"prompt": [1, 1.5]}, "prompt", "integers from 0"),
        ({"prompt": [1, True]}, "prompt", "integers from 0"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": [2048]}, "prompt", "ids run from 0 to 2047"),
        ({"prompt": [BIG]}, "prompt", "ids run from 0 to 2047"),
        ({"prompt": [[1], [2048]]}, "prompt", "prompt 1: "),
        ({"prompt": None}, "prompt", "non-empty"),
        ({"prompt": 5}, "prompt", "non-empty"),
        ({"prompt": {"text": "x"}}, "prompt", "non-empty"),
        ({"prompt": ["x"] * 257}, "prompt", "at most 256 prompts"),
        ({"prompt": ["x"] * 9, "n": 128}, "n", "at most 1024"),
        ({"prompt": [1] * 131_073}, "prompt", "at most 131072"),
        ({"prompt": [[1] * 131_072, [1] * 131_072, [1]]}, "prompt", "262144 token ids in all"),
        ({"prompt": [1] * 1024}, "prompt", "1023 leave room"),
        ({"prompt": ["x", "a b " * 700]}, "prompt", "prompt 1: the prompt has"),
        ({"prompt": "x" * 14_000}, "prompt", "14000 bytes"),
        ({"prompt": ["x", "x" * 14_000]}, "prompt", "prompt 1: the prompt has 14000 bytes"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": BIG}, "n", "less than or equal to 128"),
        ({"n": 2.0}, "n", "integer"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"temperature": BIG}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "unless 'echo'"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "at most 'max_tokens'"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_tokens (2)"),
        ({"max_tokens": 2000, "min_tokens": 1500}, "min_tokens", "leave room"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"echo": 1}, "echo", "boolean"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 257}, "stop", "1 to 256"),
        ({"stop": [1]}, "stop", "strings"),
        ({"stop": {"x": 1}}, "stop", "list"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
        ({"stop_token_ids": [2048]}, "stop_token_ids", "ends at 2047"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logit_bias": {"2048": 1}}, "logit_bias", "ends at 2047"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"1": BIG}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"1": None}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": [1]}, "logit_bias", "object"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream' to be true"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options", "'stream' to be true"),
        ({"user": "x" * 513}, "user", "at most 512"),
        ({"best_of": 2}, "best_of", "only as 'n' (1), got 2"),
        ({"best_of": 1, "n": 2}, "best_of", "only as 'n' (2), got 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"max_completion_tokens": 0}, "max_tokens", "unless 'echo'"),
        ({"request_id": ""}, "request_id", "at least 1 character"),
        ({"metadata": "x"}, "metadata", "valid dictionary"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids", "must have at most 1024 items, got ["),
        ({"guided_json": {}}, "guided_json", "not supported"),
        ({"\u0000": 1}, "\u0000", "not supported"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_mistaken_field_is_named(fields: dict[str, Any], param: str, words: str, api: ServerThread) -> None:
    error = _error(api.post("/v1/completions", {"prompt": "Once"} | fields))
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON object"),
        (b"null", "JSON object"),
        (b"[]", "JSON object"),
        (b'"Once"', "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x"} trailing', "not valid JSON"),
        (b"{'prompt': 'x'}", "not valid JSON"),
        (b'\xef\xbb\xbf{"prompt": "x"}', "byte order mark (U+FEFF): leave it out"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "x", "logit_bias": {"1": Infinity}}', "Infinity is not a JSON number"),
        (b'{"prompt": "x", "temperature": 1e400}', "finite number"),
        (b'{"prompt": "x", "logit_bias": {"1": 1e400}}', "-100 to 100"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b'{"prompt": "x", "prompt": "y"}', "names 'prompt' twice"),
        (b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}', "names '1' twice"),
        (b'{"prompt": "\\ud800"}', "valid Unicode"),
        (b'{"prompt": ["x", "\\udfff x"]}', "valid Unicode"),
        (b'{"prompt": "x", "stop": ["\\ud83d"]}', "valid Unicode"),
        (b'{"prompt": "x", "user": "\\uDC00"}', "valid Unicode"),
        (b'{"prompt": "x", "\\ud800": 1}', "valid Unicode"),
        (b"[" * 30_000, "nested too deeply"),
        (b'{"a":' * 15_000, "nested too deeply"),
        (b"[" * 200_000, "200000 objects and lists"),
        (b'{"prompt": [' + b"{}," * 40_000 + b"{}]}", "40003 objects and lists"),
        (b'{"prompt": ' + b'{"a": 1, "b": 2}, ' * 20_000, "40001 members"),
        (b'{"prompt": [' + b"1," * 600_000 + b"1]}", "600000 commas"),
        (b"{" + b",".join(b'"%d":1' % number for number in range(1101)) + b"}", "1101 members"),
        (b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b"}", "30000 members"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "token ids"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, words: str, api: ServerThread) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(api.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=30)
        error = _error(answer)
        assert words in error["message"] or path.endswith("chat/completions"), error


def test_null_is_as_good_as_left_out_also_for_what_is_not_supported(api: ServerThread) -> None:
    nulls: dict[str, Any] = dict.fromkeys(("suffix", "best_of", "guided_json", "temperature"))
    body = {"prompt": "Once", "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}}
    assert '"usage": {' in api.post("/v1/completions", body | nulls).text
    turn = {"role": "user", "content": "Hi", "name": None, "tool_calls": None}
    chat = {"messages": [turn], "max_tokens": 1, "response_format": None, "tools": None}
    assert api.post("/v1/chat/completions", chat).status_code == 200


def test_what_stands_in_strings_is_not_counted(api: ServerThread) -> None:
    for text in ("[{:," * 150_000, '\\\\"[{' * 40_000, "\\" * 70_001 + '"{' * 40_000):
        error = _error(api.post("/v1/completions", {"prompt": ["Once", text]}))
        assert "prompt 1: the prompt has" in error["message"], error


def test_a_pair_of_surrogate_escapes_is_a_character(api: ServerThread) -> None:
    body = b'{"prompt": "\\ud83d\\ude42", "echo": true, "max_tokens": 0}'
    answer = httpx.post(api.url + "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["choices"][0]["text"] == "🙂"


def test_extreme_numbers_that_the_engine_takes_are_served(api: ServerThread) -> None:
    for fields in (
        {"seed": 10**30},
        {"seed": -(10**4000)},
        {"top_k": 10**30},
        {"max_tokens": 10**30, "stop": ["e"]},
        {"temperature": 1e-320},
        {"temperature": 1e308, "max_tokens": 2},
        {"top_p": 1e-320, "max_tokens": 2},
        {"temperature": -0.0},
    ):
        body = {"prompt": "Once", "seed": 1, "max_tokens": 2} | fields
        answer = api.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text


def test_a_text_that_cannot_fit_is_never_tokenized(api: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[int] = []
    encode = api.client.encode

    def watched(text: str) -> list[int]:
        tokenized.append(len(text))
        return encode(text)

    monkeypatch.setattr(api.client, "encode", watched)
    for prompt in ("x" * 1_000_000, ["Once", "🙂" * 100_000]):
        assert "bytes" in _error(api.post("/v1/completions", {"prompt": prompt}))["message"]
    assert tokenized == []
    assert "tokens" in _error(api.post("/v1/completions", {"prompt": "a b " * 1000}))["message"]
    assert tokenized == [4000]


def test_long_texts_are_tokenized_off_the_event_loop(api: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    threads: list[str] = []
    encode = api.client.encode

    def watched(text: str) -> list[int]:
        threads.append("loop" if threading.get_ident() == loop else "other")
        return encode(text)

    loop = api.call(threading.get_ident)
    monkeypatch.setattr(api.client, "encode", watched)
    api.post("/v1/completions", {"prompt": "Once", "max_tokens": 1})
    api.post("/v1/completions", {"prompt": "a b " * 1100, "max_tokens": 1})
    api.post("/v1/completions", {"prompt": ["a b " * 600] * 2, "max_tokens": 1})
    api.post("/tokenize", {"prompt": "a b " * 1100})
    assert threads == ["loop", "other", "other", "other", "other"]


def test_no_text_is_too_long_to_try_where_tokens_may_swallow_spaces(api: ServerThread) -> None:
    from tokenizers import AddedToken

    from tests.support.tokenizers import byte_tokenizer

    class Client:
        config, detokenizer, tokenizer = api.client.config, api.client.detokenizer, byte_tokenizer()

    assert PromptReader(Client(), None)._max_bytes is not None  # type: ignore[arg-type]
    Client.tokenizer.add_tokens([AddedToken("<gap>", rstrip=True)])
    assert PromptReader(Client(), None)._max_bytes is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/models/gpt-5", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/completions/", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_said_in_the_same_shape(
    method: str, path: str, status: int, code: str, api: ServerThread
) -> None:
    answer = httpx.request(method, api.url + path)
    assert _error(answer, status)["code"] == code
    assert (status == 405) == ("allow" in answer.headers)


def test_another_content_type_is_refused(api: ServerThread) -> None:
    answer = httpx.post(f"{api.url}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert _error(answer, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "deflate, gzip"])
def test_a_compressed_body_is_refused(encoding: str, api: ServerThread) -> None:
    def post(encoding: str) -> httpx.Response:
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        return httpx.post(f"{api.url}/tokenize", content=b'{"prompt": "x"}', headers=headers)

    error = _error(post(encoding), 415)
    assert error["code"] == "unsupported_media_type" and f"got the content encoding {encoding}:" in error["message"]
    assert post("identity").status_code == 200


def test_an_unexpected_failure_tells_and_logs_nothing_of_the_prompt(
    api: ServerThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(text: str) -> list[int]:
        raise KeyError(text)

    monkeypatch.setattr(api.client, "encode", fail)
    for stream in (False, True):
        answer = api.post("/v1/completions", {"prompt": "Rumpelstiltskin", "stream": stream})
        assert "Rumpel" not in _error(answer, 500)["message"]
    assert "KeyError" in caplog.text and "in fail" in caplog.text and "Rumpel" not in caplog.text


def test_openais_client_raises_what_it_raises_for_openai(api: ServerThread) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="storyteller", prompt="x", temperature=-1)
        assert refused.value.param == "temperature" and "-1" in refused.value.message
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="gpt-5", prompt="x")
        assert missing.value.code == "model_not_found"


def test_a_full_queue_says_when_to_come_back() -> None:
    with ServerThread(max_queued_requests=2) as server:
        server.call(lambda: server.client.admission.wait("another", 1))
        answer = server.post("/v1/completions", {"prompt": ["Once", "Twice"]})
        assert _error(answer, 503)["code"] == "queue_full" and int(answer.headers["Retry-After"]) >= 1
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="storyteller", prompt=["Once", "Twice"], stream=True)
            assert refused.value.code == "queue_full"
        assert server.post("/v1/completions", {"prompt": "Once"}).status_code == 200, "none of the two was let in"
        server.wait_until_idle()


def test_errors_quote_no_more_than_a_little_of_what_was_sent(api: ServerThread) -> None:
    for fields in ({"n": "x" * 100_000}, {"x" * 100_000: 1}, {"model": "é" * 100_000}, {"stop": ["x" * 100_000]}):
        answer = api.post("/v1/completions", {"prompt": "Once"} | fields)
        assert 400 <= answer.status_code < 500 and len(answer.content) < 2000
        json.loads(answer.content)
