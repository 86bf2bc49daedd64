"""How a server starts and how it ends: in order when asked to, loudly when its engine dies, leaving no process behind.

What happens to requests when it is told to end is in ``test_real_drain.py``.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pagebrain.assets import BUNDLED_MODEL
from tests.support.served import ROOT, Served, environment, events

POOL = ("--num-blocks", "64", "--max-num-seqs", "8")
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def test_when_the_engine_is_killed_everybody_is_told_and_the_server_exits_with_an_error() -> None:
    with Served(*POOL) as served, httpx.Client(base_url=served.url, timeout=60) as other:
        assert other.get("/health").status_code == 200
        with httpx.stream("POST", served.url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)
            got = [next(data)]
            served.engine.kill()
            got.extend(data)  # ends: no client hangs
        error = json.loads(got[-1] if got[-1] != "[DONE]" else got[-2])["error"]
        assert "the engine has stopped" in error["message"]
        health = other.get("/health")
        assert health.status_code == 503 and "engine" in health.text
        assert other.post("/v1/completions", json=ENDLESS).status_code == 503
        assert served.wait() == 70
        served.wait_gone()
        assert any(line.startswith("pagebrain: error: the engine has stopped") for line in served.lines)


STARTER = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is inherited, and the process that runs the tests may ignore it
leads_a_session = pathlib.Path("setsid.txt").exists()
server = subprocess.Popen(sys.argv[1:], stderr=open("stderr.txt", "w"), start_new_session=leads_a_session)
print(server.pid, flush=True)
time.sleep(600)
"""


def told_to_end_again_and_again(served: Served, number: signal.Signals) -> None:
    """It ends in order, and says why once."""
    times = 0
    while served.process.poll() is None:  # to its very end, when signals are not handled any more
        served.process.send_signal(number)
        times += 1
        time.sleep(0.01)
    assert times > 5
    assert served.wait() == 0
    assert [line for line in served.lines if "ending" in line] == [
        f"pagebrain: {number.name}: ending, with no request under way"
    ]
    served.wait_gone()


def test_beyond_loopback_without_a_key_there_is_a_warning_and_repeated_sigterms_end_it_in_order() -> None:
    with Served("--host", "0.0.0.0", *POOL) as served:
        assert any("warning" in line and "--api-key" in line for line in served.lines)
        told_to_end_again_and_again(served, signal.SIGTERM)


def test_options_without_a_command_serve_with_a_key_from_the_environment_and_repeated_sigints_end_it_in_order() -> None:
    settings = ("--model", str(BUNDLED_MODEL), "--served-model-name", "stories", "--host", "0.0.0.0", *POOL)
    with Served(*settings, command=(), env=environment() | {"PAGEBRAIN_API_KEY": "secret"}) as served:
        assert not any("warning" in line for line in served.lines)
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/v1/models").status_code == 401
        models = httpx.get(url + "/v1/models", headers={"authorization": "Bearer secret"}).json()
        assert [model["id"] for model in models["data"]] == ["stories"]
        told_to_end_again_and_again(served, signal.SIGINT)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process, Callable[[], str]]]:
    """A process that has started a server, the server, and what that has said; whatever is left at the end is killed."""
    line = [sys.executable, "-m", "pagebrain", "serve", "--port", "0", *POOL]
    said = folder / "stderr.txt"
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, *line], stdout=subprocess.PIPE, text=True, cwd=folder, env=environment()
    ) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        family = [server]
        try:
            until = time.monotonic() + 90
            while "serving" not in said.read_text() and time.monotonic() < until:
                time.sleep(0.05)
            assert "serving" in said.read_text()
            family += server.children(recursive=True)
            yield starter, server, said.read_text
            assert not psutil.wait_procs(family, timeout=15)[1]
        finally:
            starter.kill()
            for process in family:
                if process.is_running():
                    process.kill()


def test_when_the_parent_is_killed_the_server_ends(tmp_path: Path) -> None:
    with started(tmp_path) as (starter, server, said):
        starter.kill()
        server.wait(15)
        why = "the process that started the server has gone"
        assert said().splitlines()[-1] == f"pagebrain: {why}: ending, with no request under way"


def test_a_server_meant_to_stay_outlives_its_parent_and_when_it_is_killed_its_engine_goes_too(tmp_path: Path) -> None:
    (tmp_path / "setsid.txt").touch()
    with started(tmp_path) as (starter, server, said):
        family = [server, *server.children(recursive=True)]
        starter.kill()
        time.sleep(2)  # it would have looked for its parent
        assert all(process.is_running() for process in family)
        url = said().splitlines()[-1].rpartition(" at ")[2].strip()
        with httpx.stream("POST", url + "/v1/completions", json=ENDLESS, timeout=60) as response:
            data = events(response)  # kept: dropping it closes the stream
            next(data)
            server.kill()


def test_a_port_in_use_is_one_line_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = [sys.executable, "-m", "pagebrain", "serve", "--port", port]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"pagebrain: error: cannot listen on 127.0.0.1 port {port}: Address already in use: choose another --port"
    ]


@pytest.mark.parametrize("model", ["no folder", "no weights"])
def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_nothing(tmp_path: Path, model: str) -> None:
    folder = tmp_path / model
    if model == "no weights":  # everything else is there: it is the engine's process that finds out
        shutil.copytree(BUNDLED_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with Served("--model", str(folder), wait=False, start_new_session=True) as served:
        assert served.wait(90) == 2
        (line,) = served.lines
        wrong = f"the folder {folder} has no weights" if model == "no weights" else f"there is no model folder {folder}"
        assert line.startswith(f"pagebrain: error: {wrong}")
        left = [process for process in psutil.process_iter() if _runs_in_session(process, served.process.pid)]
        assert not psutil.wait_procs(left, timeout=10)[1]


def _runs_in_session(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader and bool(process.status() != psutil.STATUS_ZOMBIE)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@pytest.mark.parametrize(("how", "after_s"), [("the server", 0.0), ("the server", 0.5), ("its group", 0.2)])
def test_told_to_end_while_it_loads_it_ends(how: str, after_s: float) -> None:
    with Served(wait=False, start_new_session=True) as served:
        served.wait_for_engine()
        time.sleep(after_s)
        if how == "the server":
            served.process.send_signal(signal.SIGTERM)
        else:  # as the terminal does it
            os.killpg(served.process.pid, signal.SIGINT)
        assert served.wait(30) == 0
        assert not served.url, "it had loaded already"
        (line,) = served.lines
        name = "SIGTERM" if how == "the server" else "SIGINT"
        assert line == f"pagebrain: {name}: ending before the model is loaded"
        served.wait_gone()


def test_an_engine_that_is_killed_while_it_loads_is_one_line_and_an_error() -> None:
    with Served(wait=False) as served:
        served.wait_for_engine().kill()
        assert served.wait(30) == 70
        (line,) = served.lines
        assert line.startswith("pagebrain: error: ") and "engine" in line
        served.wait_gone()
