"""A client of the real server that never reads: it costs the others nothing, and its own request ends."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.served import Served, choices, events
from tests.support.slow_client import SlowClient

HUGE = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "logprobs": 20, "n": 32}
"""Twenty-four megabytes: more than the system's buffers and the tokens that may wait for a reader together."""

SHORT = {"prompt": "Once upon a time", "max_tokens": 30, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served("--num-blocks=2048", "--max-num-seqs=40") as served:
        yield served


def test_who_never_reads_holds_up_nobody_and_ends_with_an_error(served: Served) -> None:
    with SlowClient(served.url, "/v1/completions", HUGE | {"stream": True}) as stuck:
        served.wait_until(lambda: served.metric("num_requests_running") == 32, "the slow client's request did not start")
        texts = set()
        num_meanwhile = num_served = 0
        while served.num_ended("error") == 0:
            with httpx.stream("POST", served.url + "/v1/completions", json=SHORT, timeout=60) as response:
                data = list(events(response))
            assert data[-1] == "[DONE]" and choices(data)[-1]["finish_reason"] == "length"
            texts.add("".join(choice["text"] for choice in choices(data)))
            num_served += 1
            assert served.num_ended("length") == num_served, "the slow client's request came to its end"
            num_meanwhile += served.num_ended("error") == 0
        assert num_meanwhile >= 2, "no other client was served while the slow client's request ran"
        assert len(texts) == 1
        served.wait_until(served.is_idle, "the slow client's blocks did not come back")
        assert served.num_ended("error") == 1
        got = stuck.take_all()  # what had been sent, then why there is no more
    assert '"code": "slow_reader"' in got and "[DONE]" not in got
    assert '"finish_reason": "length"' not in got


def test_who_reads_slowly_but_reads_gets_everything(served: Served) -> None:
    ended = served.num_ended("length")
    asked = HUGE | {"stream": True, "n": 8, "max_tokens": 300}
    with SlowClient(served.url, "/v1/completions", asked) as slow:
        slow.trickle(1.5)
        got = slow.take_all()
    assert got.count('"finish_reason": "length"') == 8 and got.endswith("data: [DONE]\n\n\r\n0\r\n\r\n")
    assert served.num_ended("length") == ended + 1
