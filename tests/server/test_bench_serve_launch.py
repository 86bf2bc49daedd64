"""``bench serve --launch``: the server is there while it is needed, and gone afterwards, however that time ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pagebrain.bench.serve.target import launched, parse_launch
from pagebrain.cli.arguments import engine_settings_of
from pagebrain.errors import ConfigError, PageBrainError

# A server in name: it starts a process of its own, as ours does, says that it is ready, and waits to be ended.
_PRETEND = """
import os, signal, subprocess, sys, time
folder, how = sys.argv[1], sys.argv[2]
if how == "dies":
    sys.exit("pagebrain: error: no such model")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open(folder + "/pids", "w").write(f"{os.getpid()} {child.pid}")
open(folder + "/seen", "w").write(" ".join([*sys.argv[3:], os.environ["OMP_NUM_THREADS"], os.environ["PAGEBRAIN_API_KEY"]]))
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how != "slow":
    print("pagebrain: serving gpt2 at http://127.0.0.1:4321", file=sys.stderr, flush=True)
for _ in range(20000):
    print("noise " * 10, file=sys.stderr)  # more than a pipe holds
open(folder + "/not-blocked", "w").close()
time.sleep(100)
"""


def command(folder: Path) -> list[str]:
    return [sys.executable, "-c", _PRETEND, str(folder)]


def pids(folder: Path) -> list[int]:
    wait_for(folder / "pids")
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and (path.stat().st_size or path.name == "not-blocked")):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


def assert_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process is still there"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and whose status was not read yet."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text() if sys.platform == "linux" else ""
    except (ProcessLookupError, FileNotFoundError):
        return False
    return ") Z " not in status


def test_the_server_is_told_its_settings_and_all_of_it_is_gone_afterwards(tmp_path: Path) -> None:
    with launched(["normal", "--async-scheduling"], api_key="key", threads=3, command=command(tmp_path)) as url:
        assert url == "http://127.0.0.1:4321"
        running = pids(tmp_path)
        wait_for(tmp_path / "not-blocked")
        assert all(is_running(pid) for pid in running)
    assert_gone(running)
    assert (tmp_path / "seen").read_text() == "--async-scheduling --port 0 3 key"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_server_is_gone_when_the_run_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), launched(["normal"], api_key="key", threads=1, command=command(tmp_path)):
        running = pids(tmp_path)
        raise error
    assert_gone(running)


def test_a_server_that_does_not_hear_is_ended_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagebrain.bench.serve.target._STOP_TIMEOUT_S", 0.2)
    with launched(["deaf"], api_key="key", threads=1, command=command(tmp_path)):
        running = pids(tmp_path)
    assert_gone(running)


def test_a_server_that_ends_before_it_is_ready_is_quoted(tmp_path: Path) -> None:
    expected = "ended with exit status 1 before it was ready; it said: pagebrain: error: no such model"
    with pytest.raises(PageBrainError, match=expected), launched(["dies"], command=command(tmp_path)):
        pass


def test_a_server_that_is_never_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    given = {"api_key": "key", "threads": 1, "command": command(tmp_path)}
    with pytest.raises(PageBrainError, match="was not ready after 1 s"), launched(["slow"], ready_timeout_s=1, **given):  # type: ignore[arg-type]
        pass
    assert_gone(pids(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_the_server_is_asked_to_end_when_the_bench_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pagebrain.bench.serve.target import launched\n"
        "with launched(['normal'], api_key='key', threads=1, command=sys.argv[1:]):\n    time.sleep(100)\n"
    )
    bench = subprocess.Popen([sys.executable, "-c", program, *command(tmp_path)])
    server, child = pids(tmp_path)
    wait_for(tmp_path / "not-blocked")  # from here on it writes nothing, so a pipe that is gone would not end it
    bench.send_signal(signal.SIGKILL)
    bench.wait()
    assert_gone([server])
    os.kill(child, signal.SIGKILL)  # the pretended server does not look after its own


def test_engine_settings_are_read_out_of_the_servers_arguments() -> None:
    arguments = parse_launch("--model gpt2 --served-model-name 'my model' --max-num-seqs=8 --part scheduler=a.py:B")
    assert arguments == [
        "--model",
        "gpt2",
        "--served-model-name",
        "my model",
        "--max-num-seqs=8",
        "--part",
        "scheduler=a.py:B",
    ]
    assert engine_settings_of(arguments) == {"model": "gpt2", "max_num_seqs": 8, "parts": {"scheduler": "a.py:B"}}
    assert parse_launch("") == [] and engine_settings_of([]) == {}
    for given in ("--port=8000", "--port 8000", "--api-key=k"):
        with pytest.raises(ConfigError, match="--launch must not have --"):
            parse_launch(f"--model gpt2 {given}")
