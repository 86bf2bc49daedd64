"""What ``docs/server.md`` says: its examples are tried, and its limits are those of the code."""

import re
from pathlib import Path

import httpx
import pytest

from pagebrain.sampling_params import MAX_LOGPROBS, MAX_SAMPLES
from pagebrain.server.api import body, fields, protocol
from pagebrain.server.api.prompts import MAX_TEXT
from pagebrain.server.api.service import MAX_ITEMS
from pagebrain.server.api.tokens import MAX_SILENCE_S
from pagebrain.server.guards import connections, request_parser
from pagebrain.server.live.hub import RESUME_AFTER_S
from pagebrain.server.options import ServerOptions
from tests.server.support_in_process import ServerThread

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
EXAMPLES = re.findall(r"^\$ curl -s localhost:8000(\S+) -H 'Content-Type: application/json' -d '(.+)'\n(.+)$", PAGE, re.M)
LIMITS = dict(
    re.findall(r"^\| (.+?) \| ([^|]+) \|$", PAGE.partition("no sensible request meets")[2].partition("\n\n`--max")[0], re.M)
)


def test_the_examples_answer_what_the_page_shows() -> None:
    assert {path for path, _, _ in EXAMPLES} == {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}
    [template] = re.findall(r"```jinja\n(.*?)```", PAGE, re.S)
    with ServerThread(chat_template=template) as server:
        for path, sent, shown in EXAMPLES:
            headers = {"Content-Type": "application/json"}
            answer = httpx.post(server.url + path, content=sent.encode(), headers=headers, timeout=60)
            assert re.fullmatch(re.escape(shown).replace(r"\.\.\.", ".*"), answer.text), answer.text


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("prompts in a request", fields.MAX_PROMPTS),
        ("token ids in a prompt, given as such", fields.MAX_PROMPT_TOKENS),
        ("token ids in all prompts of a request", fields.MAX_REQUEST_TOKENS),
        ("`n`", MAX_SAMPLES),
        ("answers to a request: prompts times `n`", protocol.MAX_CHOICES),
        ("`logprobs`, `top_logprobs`", MAX_LOGPROBS),
        ("tokens and log-probabilities to answer with", MAX_ITEMS),
        ("`stop`", (fields.MAX_STOPS, fields.MAX_STOP_CHARACTERS)),
        ("`stop_token_ids`, entries of `logit_bias`", protocol.MAX_STOP_TOKEN_IDS),
        ("`stop_token_ids`, entries of `logit_bias`", fields.MAX_LOGIT_BIASES),
        ("`user` and other names that a client gives", fields.MAX_LABEL_CHARACTERS),
        ("messages of a chat", protocol.MAX_MESSAGES),
        ("text for `/tokenize`", MAX_TEXT),
        ("ids for `/detokenize`", protocol.MAX_TOKENS_TO_DECODE),
        ("members of an object in a body", body.MAX_MEMBERS),
        ("objects and lists in a body, members of all its objects", body.MAX_PARTS),
        ("values in all lists and objects of a body", body.MAX_VALUES),
    ],
)
def test_the_limits_are_those_of_the_code(what: str, most: int | tuple[int, int]) -> None:
    [said] = [number for name, number in LIMITS.items() if name.partition(": all")[0] == what]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", said)]
    assert numbers == ([most] if isinstance(most, int) else list(most))


def test_every_limit_of_the_page_is_checked() -> None:
    marks = test_the_limits_are_those_of_the_code.pytestmark  # type: ignore[attr-defined]
    checked = {what for what, _ in marks[0].args[1]}
    assert {name.partition(": all")[0] for name in LIMITS} - {"what", "---"} == checked


def test_the_limits_of_connections_are_those_of_the_code() -> None:
    table = PAGE.partition("Before a key is checked")[2].partition("\n\nWhat is no HTTP")[0]
    limits = [
        int(number.replace(",", "")) for number in re.findall(r"^\| .+? \| ([\d,]+)(?: bytes| seconds)? \|", table, re.M)
    ]
    own = (request_parser.MAX_TARGET_BYTES, request_parser.MAX_HEADERS, request_parser.MAX_HEADER_BYTES)
    others = (request_parser.MAX_HEAD_BYTES, connections.MAX_PIPELINED, connections.HEADERS_S)
    assert limits == [*own, *others]
    assert f"`--keep-alive-seconds`, {ServerOptions().keep_alive_s:g} by default" in PAGE


def test_the_times_are_those_of_the_code() -> None:
    assert (RESUME_AFTER_S, MAX_SILENCE_S) == (10, 60)
    assert "Ten seconds after the last page\nhas gone" in PAGE and "said nothing for 60 seconds" in PAGE
