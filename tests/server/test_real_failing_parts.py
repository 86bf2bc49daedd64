"""A user's part fails behind the real server: the requests concerned are told, and the text of prompts stays inside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.support.served import Served, choices, events
from tests.support.served_parts import FATAL, REFUSED

POOL = ("--num-blocks", "64", "--max-num-seqs", "8", "--part", "scheduler=tests.support.served_parts:Failing")
SECRET = [1711, 1722, 1733]
"""Tokens of both prompts that the part fails over. No port, line number or count in what a server says is near them."""

INNOCENT = {"prompt": "Once upon a time", "max_tokens": 600, "ignore_eos": True, "temperature": 0, "stream": True}
ASKED = {"max_tokens": 5, "ignore_eos": True}


@contextmanager
def streaming(served: Served) -> Iterator[Iterator[str]]:
    """The events of another client's request, which has begun."""
    with httpx.stream("POST", served.url + "/v1/completions", json=INNOCENT, timeout=60) as response:
        data = events(response)
        next(data)
        yield data


def secrets_in(*texts: str) -> list[str]:
    return [number for text in texts for number in re.findall(r"\d+", text) if int(number) in (*SECRET, REFUSED, FATAL)]


def the_engine_ends_over_a_request(served: Served, log_level: str) -> None:
    """What the part says reaches the log of level debug, and no client."""
    with httpx.Client(base_url=served.url, timeout=60) as other:
        assert other.get("/health").status_code == 200  # this connection stays open
        with streaming(served) as others:
            own = served.post("/v1/completions", ASKED | {"prompt": [FATAL, *SECRET], "stream": True})
            last = list(others)[-1]
        health = other.get("/health")
        assert health.status_code == 503
        assert served.wait() == 70
    for told in (own.text, last, health.text):
        assert "RuntimeError" in told and "served_parts.py" in told
        assert not secrets_in(told)
    said = secrets_in(*served.lines)
    assert {int(number) for number in said} == ({FATAL, *SECRET} if log_level == "debug" else set())
    assert any("RuntimeError" in line for line in served.lines)


def test_a_request_that_the_scheduler_does_not_take_fails_alone_and_a_step_that_fails_ends_all_without_secrets() -> None:
    with Served(*POOL, "--log-level", "info") as served:
        with streaming(served) as others:
            for stream in (False, True):
                body = ASKED | {"prompt": [REFUSED, *SECRET], "n": 3, "stream": stream}
                refused = served.post("/v1/completions", body)
                assert '"error": {' in refused.text or '"error":{' in refused.text
                assert refused.status_code == 500 or stream
                assert "[DONE]" not in refused.text
                assert not secrets_in(refused.text)
            fine = served.post("/v1/completions", ASKED | {"prompt": [5, *SECRET], "n": 3})
            assert fine.status_code == 200 and fine.json()["usage"]["completion_tokens"] == 15
            rest = list(others)
        assert rest[-1] == "[DONE]" and choices(rest)[-1]["finish_reason"] == "length"
        served.wait_until(served.is_idle, "what was added before the failure stayed")
        assert served.num_ended("error") == 2
        assert not secrets_in(*served.lines)
        the_engine_ends_over_a_request(served, "info")


def test_what_a_part_says_when_it_fails_is_in_the_debug_log() -> None:
    with Served(*POOL, "--log-level", "debug") as served:
        the_engine_ends_over_a_request(served, "debug")
