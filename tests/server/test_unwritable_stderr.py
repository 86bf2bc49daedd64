"""A server whose standard error cannot be written, or is not read, serves and ends as any other.

How the streams do that is in ``tests/engine/test_standard_streams.py``.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served import ROOT, START_S, environment
from tests.support.served_parts import REFUSED

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pipes as POSIX has them")

POOL = ("--num-blocks", "64", "--max-num-seqs", "8")


@contextlib.contextmanager
def server(
    *arguments: str, command: tuple[str, ...] = (), stderr: Any = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The URL of a server that answers, and its process; whatever is left of it at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*command, sys.executable, "-m", "pagebrain", "serve", "--port", str(port), *POOL, *arguments]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, env=environment())
    family = [psutil.Process(process.pid)]
    try:
        until = time.monotonic() + START_S
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            assert time.monotonic() < until and process.poll() is None, "the server did not start"
            time.sleep(0.05)
        family += family[0].children(recursive=True)
        yield url, process
        assert not psutil.wait_procs(family, timeout=15)[1]
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def engine_of(process: "subprocess.Popen[bytes]") -> psutil.Process:
    children = psutil.Process(process.pid).children()
    (engine,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return engine


def test_with_none_of_its_standard_streams_usable_it_serves_and_ends_when_told_to() -> None:
    reading, writing = os.pipe()
    with server(command=("sh", "-c", 'exec "$@" 0<&- 1>&-', "sh"), stderr=writing) as (url, process):
        os.close(writing)
        os.close(reading)
        answer = httpx.post(url + "/v1/completions", json={"prompt": "Once", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_when_its_engine_dies_it_ends_with_an_error_though_the_disk_of_its_log_is_full() -> None:
    with open("/dev/full", "wb") as full, server("--log-requests", stderr=full) as (url, process):
        answer = httpx.post(url + "/v1/completions", json={"prompt": "Once", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        engine_of(process).kill()
        assert process.wait(30) == 70


STARTER = """
import signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is inherited, and the process that runs the tests may ignore it
subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE).wait()
"""


def test_it_ends_with_its_parent_though_that_was_the_reader_of_its_log() -> None:
    with server(command=(sys.executable, "-c", STARTER)) as (_, starter):
        starter.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a pipe small as Linux does")
def test_a_log_that_is_not_read_holds_up_neither_server_nor_engine_nor_their_end() -> None:
    import fcntl

    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    part = "scheduler=tests.support.served_parts:Failing"
    with os.fdopen(reading, "rb") as log, server("--log-requests", "--part", part, stderr=writing) as (url, process):
        os.close(writing)
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(40):  # each makes the engine and the server write a line
                refused = client.post("/v1/completions", json={"prompt": [REFUSED], "n": 2, "max_tokens": 1})
                assert refused.status_code == 500
            answer = client.post("/v1/completions", json={"prompt": [50, 60], "max_tokens": 1})
            assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        got = log.read()
    assert 4096 - 400 < len(got) <= 4096, "the pipe was not full"
