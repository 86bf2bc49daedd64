"""Clients of the real server that go away: their blocks come back within a few steps, counted and not timed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.served import Served, environment, events
from tests.support.slow_client import SlowClient

NUM_BLOCKS = 64
MAX_STEPS = 10
"""From a hang-up to free blocks: the engine may have launched one step and have begun another when it hears of it."""

POOL = (f"--num-blocks={NUM_BLOCKS}", "--max-num-seqs=8", "--max-num-batched-tokens=512")
SLOW = ("--part", "scheduler=tests.support.served_parts:Slow")
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
WIDE = LONG | {"prompt": [[300 + index] * 150 for index in range(4)]}
"""Four prompts that share nothing: they take forty blocks at once."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*POOL, *SLOW) as served:
        yield served


@pytest.fixture
def stepping(served: Served) -> Iterator[None]:
    """Another request keeps the engine stepping and has tokens left when the test is over."""
    with httpx.stream("POST", served.url + "/v1/completions", json=LONG | {"stream": True}, timeout=60) as response:
        data = events(response)  # kept: dropping it closes the stream
        next(data)
        yield
        assert served.metric("num_requests_running") == 1, "the engine stood still meanwhile"
    served.wait_until(served.is_idle, "something was left in the engine")


CLIENT = """
import sys, httpx
json = {"content-type": "application/json"}
with httpx.stream("POST", sys.argv[1], content=sys.argv[2], headers=json, timeout=60) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


BEHIND = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Another request in the same write: the first one is not the last thing that the server hears of."""


@pytest.mark.parametrize(
    "asked, behind",
    [
        ("a stream", b""),
        ("a stream", BEHIND),
        ("a whole answer", b""),
        ("a whole answer", BEHIND),
        ("a generation", b""),
        ("a killed client's stream", b""),
    ],
)
def test_who_leaves_gives_the_blocks_back_within_a_few_steps(
    served: Served, stepping: None, asked: str, behind: bytes
) -> None:
    path, body = "/v1/completions", WIDE | {"stream": asked != "a whole answer"}
    body["cache_salt"] = f"{asked} {len(behind)}"  # so that it takes its blocks alone, and shares none with earlier ones
    num_seqs = 4
    if asked == "a generation":
        path, body, num_seqs = "/generate", {"prompt": "word " * 400, "max_new_tokens": 300}, 1
    if asked == "a killed client's stream":
        line = [sys.executable, "-c", CLIENT, served.url + path, json.dumps(body)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, env=environment()) as client:
            num_steps = _leave_when_running(served, num_seqs, client.kill)
    else:
        with SlowClient(served.url, path, body, behind) as leaver:
            num_steps = _leave_when_running(served, num_seqs, leaver.hang_up)
    assert num_steps <= MAX_STEPS
    assert not [line for line in served.lines if line.startswith(("pagebrain: warning", "pagebrain: error", "Traceback"))]


def test_who_leaves_while_waiting_is_waited_for_no_longer(served: Served, stepping: None) -> None:
    with SlowClient(served.url, "/v1/completions", LONG | {"n": 7}) as seated:
        served.wait_until(lambda: served.metric("num_requests_running") == 8, "the seats were not taken")
        with SlowClient(served.url, "/v1/completions", WIDE) as leaver:
            served.wait_until(lambda: served.metric("num_requests_waiting") == 4, "the leaver did not wait")
            before = _num_steps(served.metrics())
            leaver.hang_up()
            served.wait_until(lambda: served.metric("num_requests_waiting") == 0, "the leaver is still waited for")
            assert _num_steps(served.metrics()) - before <= MAX_STEPS
        seated.hang_up()
        served.wait_until(lambda: served.metric("num_requests_running") == 1, "the others stayed")


def _leave_when_running(served: Served, num_seqs: int, leave: Any) -> int:
    """Steps from the hang-up until nothing of the leaver is left."""
    served.wait_until(lambda: served.metric("num_requests_running") == 1 + num_seqs, "the leaver did not run")
    before = served.metrics()
    leave()
    while (after := served.metrics())["num_requests_running"] + after["num_requests_waiting"] > 1:
        assert _num_steps(after) < _num_steps(before) + 150, "the leaver is still computed for"
        time.sleep(0.002)
    others = int(after["kv_cache_usage_perc"] * NUM_BLOCKS)
    assert before["kv_cache_usage_perc"] * NUM_BLOCKS >= others + 20, "the blocks did not come back"
    return _num_steps(after) - _num_steps(before)


def _num_steps(metrics: dict[str, float]) -> int:
    return int(metrics["iteration_tokens_total_count"])
