"""Standard streams that no process depends on: what cannot be written is dropped and counted, and a thread may write it."""

import ast
import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagebrain.standard_streams import UnfailingFile
from tests.support.served import ROOT, environment


def lines(numbers: range) -> list[bytes]:
    return [b"line %d\n" % number for number in numbers]


def read_until_drained(file: UnfailingFile, reading: int, writing: int) -> bytes:
    """All that comes out of a pipe while a file's queue is written into it. Closes both ends."""
    with os.fdopen(reading, "rb") as pipe, ThreadPoolExecutor(1) as pool:
        got = pool.submit(pipe.read)
        drained = file.drain(30)
        os.close(writing)
        assert drained
        return got.result(30)


def test_what_cannot_be_written_is_dropped_counted_and_told_of_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, is_full = os.write, True

    def sometimes_full(fd: int, data: bytes) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(fd, data)

    with open(tmp_path / "log", "wb") as log:
        file = UnfailingFile(log.fileno())
        monkeypatch.setattr(os, "write", sometimes_full)
        assert [file.write(line) for line in lines(range(3))] == [7, 7, 7]
        assert file.num_lost == 3
        is_full = False
        file.write(b"after\n")
        file.write(b"and again\n")
    assert (tmp_path / "log").read_text().splitlines() == [
        "pagebrain: warning: lines that could not be written here and are lost: 3",
        "after",
        "and again",
    ]


def test_queued_lines_come_out_in_order_and_are_waited_for(tmp_path: Path) -> None:
    expected = lines(range(1000))
    with open(tmp_path / "log", "wb") as log:
        file = UnfailingFile(log.fileno())
        file.queue()
        for line in expected:
            file.write(line)
        assert file.drain(30)
    assert (tmp_path / "log").read_bytes() == b"".join(expected)


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_queue_that_nobody_empties_holds_up_neither_writing_nor_the_end() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, True)
    file = UnfailingFile(writing, max_queued_bytes=100_000)
    file.queue()
    line = b"x" * 999 + b"\n"
    writer = threading.Thread(target=lambda: [file.write(line) for _ in range(400)], daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive(), "writing waits for the reader"
    assert 0 < file.num_lost < 400
    assert not file.drain(0.05)
    kept = 400 - file.num_lost
    told = b"pagebrain: warning: lines that could not be written here and are lost: %d\n" % file.num_lost
    got = read_until_drained(file, reading, writing)
    assert got.replace(told, b"") == line * kept and told in got


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_descriptor_that_does_not_block_loses_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    file = UnfailingFile(writing)
    file.queue()
    text = b"y" * 300_000 + b"\n"
    file.write(text)
    assert read_until_drained(file, reading, writing) == text and file.num_lost == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_error_that_cannot_be_written_does_not_change_the_exit_status() -> None:
    command = [sys.executable, "-m", "pagebrain", "serve", "--port", "70000"]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stderr=full, cwd=ROOT, env=environment(), timeout=120).returncode == 2


SHOWS_DESCRIPTORS = """
import os, subprocess, sys
from pagebrain.cli.frame import CommandLine

def show(argv):
    print("on stdout")
    print("on stderr", file=sys.stderr)
    inherited = subprocess.run([sys.executable, "-c", "import os; [os.fstat(fd) for fd in range(3)]"])
    taken = os.open(os.devnull, os.O_RDONLY)
    return 40 + (taken > 2) + (inherited.returncode == 0)

CommandLine._run = lambda self, argv: show(argv)
sys.exit(CommandLine("test", "test", "", "", {}, "{}", ()).main([]))
"""


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes them")
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_descriptors_are_taken_by_nothing_else(closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, SHOWS_DESCRIPTORS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
    assert done.returncode == 42, done
    assert done.stdout == ("" if "1>" in closed else "on stdout\n")
    assert done.stderr == ("" if "2>" in closed else "on stderr\n")


def test_python_without_docstrings_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "pagebrain", "generate", "Once upon a time"]
    settings = environment() | {"PYTHONOPTIMIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pagebrain: error: ") and "PYTHONOPTIMIZE" in line


def test_python_without_asserts_loses_no_check() -> None:
    found = []
    for path in (ROOT / "pagebrain").rglob("*.py"):
        found += [(path, node) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]
    assert len(found) > 10
    for path, node in found:  # they tell the type checker what holds anyway
        said = ast.unparse(node.test)
        parts = [part.strip("()") for part in said.split(" and ")]
        assert all(part.endswith(" is not None") or part.startswith("isinstance(") for part in parts), f"{path}: {said}"


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_table_whose_reader_has_gone_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pagebrain", "doctor"]
    with os.fdopen(writing, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, env=environment(), timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")
