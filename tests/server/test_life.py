"""How a server ends: in order when asked to, loudly when its engine dies, and never leaving a process behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pagebrain.assets import BUNDLED_MODEL
from tests.support.served import ROOT, Served, environment

POOL = ("--num-blocks", "64", "--max-num-seqs", "8")
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def events(response: httpx.Response) -> Iterator[str]:
    """The data of each server-sent event."""
    return (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))


def tokens_of(data: list[str]) -> str:
    return "".join(json.loads(event)["choices"][0]["text"] for event in data if event != "[DONE]")


def wait_gone(served: Served, timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while served.processes_left() and time.monotonic() < until:
        time.sleep(0.05)
    assert not served.processes_left()


def test_told_to_end_it_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    with Served(*POOL) as served, httpx.Client(base_url=served.url, timeout=60) as other:
        assert other.get("/health").status_code == 200
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.process.send_signal(signal.SIGTERM)
            served.wait_until(lambda: other.get("/health").status_code == 503, "/health went on saying 200")
            refused = other.post("/v1/completions", json=ENDLESS)
            assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
            got.extend(data)
        assert got[-1] == "[DONE]"
        assert json.loads(got[-2])["choices"][0]["finish_reason"] == "length"
        assert served.wait() == 0
        wait_gone(served)
        assert any("finishing 1 requests" in line for line in served.lines)


@pytest.mark.parametrize("how", ["the drain limit", "a second signal"])
def test_who_does_not_finish_in_time_is_ended_and_told(how: str) -> None:
    limit = "0.3" if how == "the drain limit" else "300"
    with Served(*POOL, "--drain-seconds", limit) as served:
        body = ENDLESS | {"n": 8}
        with httpx.stream("POST", served.url + "/v1/completions", json=body, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.process.send_signal(signal.SIGTERM)
            if how == "a second signal":
                served.wait_until(lambda: served.get("/health").status_code == 503, "it did not drain")
                served.process.send_signal(signal.SIGTERM)
            got.extend(data)
        choices = [choice for event in got if event != "[DONE]" for choice in json.loads(event).get("choices", [])]
        assert "abort" in {choice["finish_reason"] for choice in choices}
        assert served.wait() == 0
        wait_gone(served)


def test_when_the_engine_is_killed_everybody_is_told_and_the_server_exits_with_an_error() -> None:
    with Served(*POOL) as served, httpx.Client(base_url=served.url, timeout=60) as other:
        assert other.get("/health").status_code == 200
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.engine.kill()
            got.extend(data)  # ends: nobody hangs
        error = json.loads(got[-1] if got[-1] != "[DONE]" else got[-2])["error"]
        assert "the engine has stopped" in error["message"]
        health = other.get("/health")
        assert health.status_code == 503 and "engine" in health.text
        assert other.post("/v1/completions", json=ENDLESS).status_code == 503
        assert served.wait() == 70
        wait_gone(served)
        assert any(line.startswith("pagebrain: error: the engine has stopped") for line in served.lines)


def test_when_the_server_is_killed_the_engine_goes_too() -> None:
    with Served(*POOL) as served:
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            next(events(response))
            served.process.kill()
        wait_gone(served)


STARTER = """
import pathlib, subprocess, sys, time
leads_a_session = pathlib.Path("setsid.txt").exists()
server = subprocess.Popen(sys.argv[1:], stderr=open("stderr.txt", "w"), start_new_session=leads_a_session)
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("leads_a_session", [False, True])
def test_when_the_parent_is_killed_the_server_ends_unless_meant_to_stay(tmp_path: Path, leads_a_session: bool) -> None:
    if leads_a_session:
        (tmp_path / "setsid.txt").touch()
    line = [sys.executable, "-m", "pagebrain", "serve", "--port", "0", *POOL]
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, *line], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    ) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        said = tmp_path / "stderr.txt"
        until = time.monotonic() + 90
        while "serving" not in said.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert "serving" in said.read_text()
        family = [server, *server.children(recursive=True)]
        starter.kill()
    try:
        if leads_a_session:
            time.sleep(2)
            assert all(process.is_running() for process in family)
            server.terminate()
        gone, left = psutil.wait_procs(family, timeout=15)
        assert not left
    finally:
        for process in family:
            if process.is_running():
                process.kill()


CLIENT = """
import sys, httpx
json = {"content-type": "application/json"}
with httpx.stream("POST", sys.argv[1], content=sys.argv[2], headers=json, timeout=60) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


def test_a_killed_client_gives_its_blocks_back() -> None:
    with Served(*POOL) as served:
        body = json.dumps(ENDLESS | {"n": 4})
        line = [sys.executable, "-c", CLIENT, served.url + "/v1/completions", body]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment()) as client:
            assert client.stdout is not None
            client.stdout.readline()
            assert not served.is_idle()
            client.kill()
        generated = served.metric("generation_tokens_total")
        served.wait_until(served.is_idle, "blocks stayed in use", 10)
        assert generated < 4 * 900  # it was in mid-sentence


def test_a_port_in_use_is_one_line_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = [sys.executable, "-m", "pagebrain", "serve", "--port", port]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"pagebrain: error: cannot listen on 127.0.0.1 port {port}: Address already in use; name another --port"
    ]


def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_nothing() -> None:
    with Served("--model", "./no/such/folder", wait=False) as served:
        assert served.wait(90) == 2
        assert [line for line in served.lines if line.startswith("pagebrain: error: there is no")]


def test_told_to_end_while_it_loads_it_ends() -> None:
    with Served(wait=False) as served:
        time.sleep(1.5)
        family = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
        served.process.send_signal(signal.SIGTERM)
        served.wait(30)
        assert not psutil.wait_procs(family[1:], timeout=10)[1]


def test_options_without_a_command_serve() -> None:
    with Served("--model", str(BUNDLED_MODEL), "--served-model-name", "stories", *POOL, command=()) as served:
        assert [model["id"] for model in served.get("/v1/models").json()["data"]] == ["stories"]
        served.process.send_signal(signal.SIGINT)
        assert served.wait() == 0


def test_beyond_loopback_without_a_key_there_is_a_warning() -> None:
    with Served("--host", "0.0.0.0", *POOL) as served:
        assert any("warning" in line and "--api-key" in line for line in served.lines)
    with Served("--host", "0.0.0.0", *POOL, env=environment() | {"PAGEBRAIN_API_KEY": "secret"}) as served:
        assert not any("warning" in line for line in served.lines)
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
