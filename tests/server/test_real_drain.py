"""The real server's drain: what is under way comes to its end, to its client, within the limit, and nothing else begins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.served import Served, choices, environment, events
from tests.support.served_parts import HOLD
from tests.support.slow_client import SlowClient

POOL = ("--num-blocks", "64", "--max-num-seqs", "8")
SLOW = ("--part", "scheduler=tests.support.served_parts:Slow")
HELD = ("--part", "scheduler=tests.support.served_parts:Held")
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}
LARGE = {"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True, "logprobs": 20}
"""Some eight hundred bytes for each token."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


STARTER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
server = subprocess.Popen(sys.argv[1:], stderr=open("stderr.txt", "w"))
print(server.pid, flush=True)
time.sleep(600)
"""


def test_told_to_end_it_finishes_what_is_under_way_and_takes_nothing_new_though_its_parent_goes(tmp_path: Path) -> None:
    hold, said = tmp_path / "hold", tmp_path / "stderr.txt"
    hold.touch()
    line = [sys.executable, "-m", "pagebrain", "serve", "--port", "0", *POOL, *HELD]
    env = environment() | {HOLD: str(hold)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, *line], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env
    ) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        family = [server]
        try:
            until = time.monotonic() + 90
            while "serving" not in said.read_text() and time.monotonic() < until:
                time.sleep(0.05)
            family += server.children(recursive=True)
            url = said.read_text().split(" at ")[-1].strip()
            body = ENDLESS | {"max_tokens": 40}
            with (
                httpx.Client(base_url=url, timeout=60) as other,
                httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response,
            ):
                data = events(response)
                got = [next(data)]
                server.terminate()
                while other.get("/health").status_code != 503 and time.monotonic() < until:
                    time.sleep(0.02)
                assert other.get("/health").status_code == 503, "/health went on saying 200"
                refused = other.post("/v1/completions", json=body)
                assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
                starter.kill()
                time.sleep(1.2)  # it looks for its parent twice a second
                hold.unlink()  # until now the engine stood still
                got.extend(data)
            assert got[-1] == "[DONE]" and choices(got)[-1]["finish_reason"] == "length"
            assert not psutil.wait_procs(family, timeout=15)[1]
            assert "SIGTERM: finishing 1 request, for 30 seconds" in said.read_text()
        finally:
            starter.kill()
            for process in family:
                if process.is_running():
                    process.kill()


@pytest.mark.parametrize("how", ["the drain limit", "a second signal"])
def test_who_does_not_finish_in_time_is_ended_and_told(how: str) -> None:
    limit = "0.3" if how == "the drain limit" else "300"
    with Served(*POOL, *SLOW, "--drain-seconds", limit) as served:
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.process.send_signal(signal.SIGTERM)
            if how == "a second signal":
                served.wait_until(lambda: served.get("/health").status_code == 503, "it did not drain")
                served.process.send_signal(signal.SIGTERM)
            got.extend(data)
        assert choices(got)[-1]["finish_reason"] == "abort"
        assert len(choices(got)) < 900
        assert served.wait() == 0
        served.wait_gone()


def test_a_drain_lasts_until_slow_clients_have_their_answers() -> None:
    pool = ("--num-blocks", "512", "--max-num-seqs", "64")
    with (
        Served(*pool, "--drain-seconds", "60") as served,
        SlowClient(served.url, "/v1/completions", LARGE | {"n": 64, "stream": True}) as streaming,
        SlowClient(served.url, "/v1/completions", LARGE | {"n": 64}) as waiting,
    ):
        assert streaming.take() and waiting.take()
        served.wait_until(lambda: served.num_ended("length") == 2 and served.is_idle(), "the engine did not finish")
        served.process.send_signal(signal.SIGTERM)
        streaming.trickle(3.5)  # the engine has nothing left to do, and yet no client may be cut off
        stream, answer = streaming.take_all(), waiting.take_body()
        assert served.wait() == 0
    assert stream.count('"finish_reason": "length"') == 64 and "data: [DONE]\n\n" in stream
    assert [choice["finish_reason"] for choice in json.loads(answer)["choices"]] == ["length"] * 64
    assert min(len(stream), len(answer)) > 2**21, "it may all have been in the system's buffers"


def test_a_client_that_takes_nothing_holds_up_the_end_no_longer_than_the_limit() -> None:
    pool = ("--num-blocks", "512", "--max-num-seqs", "64")
    with (
        Served(*pool, "--drain-seconds", "1") as served,
        SlowClient(served.url, "/v1/completions", LARGE | {"n": 64, "stream": True}) as stuck,
    ):
        assert stuck.take()
        served.wait_until(lambda: served.num_ended("length") == 1, "the engine did not finish")
        served.process.send_signal(signal.SIGTERM)
        assert served.wait(20) == 0  # it is given up after a minute otherwise
        served.wait_gone()
        assert "[DONE]" not in stuck.take_all()


def test_an_engine_that_dies_during_the_drain_is_an_error_all_the_same() -> None:
    with Served(*POOL, *SLOW) as served:
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.process.send_signal(signal.SIGTERM)
            served.wait_until(lambda: served.get("/health").status_code == 503, "it did not drain")
            served.engine.kill()
            got.extend(data)
        assert "the engine has stopped" in json.loads(got[-1])["error"]["message"]
        assert served.wait() == 70
        served.wait_gone()
        assert [line for line in served.lines if line.startswith("pagebrain: error: the engine has stopped")]
