"""Memory of a server that holds big answers: ``python tools/answer_memory.py``.

Starts ``pagebrain serve`` for each case, sends its requests on bare sockets, and prints how far the resident memory of the
server's process and of the engine's rose above what it was before, in MiB. ``/health`` is asked all the while; its slowest
answer shows how long the event loop was held. Linux only. With ``--shapes`` it prints instead how many bytes of JSON a token
takes in answers of each shape, and how many :mod:`pagebrain.server.api.held` expects.
"""

import argparse
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the file also runs as a script
from pagebrain.sampling_params import SamplingParams  # noqa: E402
from pagebrain.server.api.held import CHAT, COMPLETION, json_bytes  # noqa: E402

MIB = 2**20
SCORED = {"prompt": list(range(100, 1100)), "echo": True, "logprobs": 20, "max_tokens": 0}
GENERATED = {"prompt": [5], "logprobs": 20, "max_tokens": 300, "ignore_eos": True}


@dataclass(frozen=True)
class Case:
    """``num_clients`` send ``body`` at the same time; each reads ``bytes_per_s`` (0: as fast as it can) for ``wait_s``."""

    name: str
    path: str
    body: dict[str, Any]
    num_clients: int = 1
    bytes_per_s: int = 0
    wait_s: float = 600.0


CASES = (
    Case("one scored prompt, n=90", "/v1/completions", SCORED | {"n": 90}),
    Case("the same, streamed", "/v1/completions", SCORED | {"n": 90, "stream": True}),
    Case("ten scored, n=25, read at 20 KB/s", "/v1/completions", SCORED | {"n": 25}, 10, 20_000, 90.0),
    Case("ten generated, n=26, read at 20 KB/s", "/v1/completions", GENERATED | {"n": 26}, 10, 20_000, 120.0),
    Case("one generated, n=90", "/v1/completions", GENERATED | {"n": 90}),
)


class Server:
    """``pagebrain serve`` on a free port. Use as a context."""

    def __init__(self, arguments: list[str]) -> None:
        line = [sys.executable, "-m", "pagebrain", "serve", "--port", "0", "--num-blocks", "8192", *arguments]
        self._process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stderr is not None
        for said in self._process.stderr:
            if found := re.search(r"serving .* at (http://\S+)", said):
                self.address = urlsplit(found[1])
                break
        else:
            raise SystemExit("the server did not start")
        own = psutil.Process(self._process.pid)
        engines = [child for child in own.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
        self.pids = {"server": own.pid, "engine": engines[0].pid}

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reset_peaks(self) -> None:
        """Count peaks from here on."""
        for pid in self.pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def memory(self, field: str) -> dict[str, float]:
        """``VmRSS`` or ``VmHWM``, its peak, of each process in MiB."""
        texts = {name: Path(f"/proc/{pid}/status").read_text() for name, pid in self.pids.items()}
        return {name: int(text.partition(f"{field}:")[2].split()[0]) / 1024 for name, text in texts.items()}


@dataclass
class Seen:
    """What clients got, all of them together."""

    num_bytes: int = 0
    statuses: tuple[str, ...] = ()


def ask(server: Server, case: Case, seen: Seen) -> None:
    """Send the case's request and read its answer at the case's pace."""
    content = json.dumps(case.body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        if case.bytes_per_s:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.address.hostname, server.address.port))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until = time.monotonic() + case.wait_s
        got = connection.recv(4096)
        seen.statuses += (got[9:12].decode(),)
        while got and time.monotonic() < until:
            seen.num_bytes += len(got)
            got = connection.recv(2048 if case.bytes_per_s else MIB)
            if case.bytes_per_s:
                time.sleep(len(got) / case.bytes_per_s)


@contextlib.contextmanager
def asked_for_health(server: Server) -> Iterator[list[float]]:
    """Ask ``/health`` again and again; the list has the seconds that each answer took."""
    took: list[float] = []
    ends = threading.Event()

    def ask_again() -> None:
        connection = http.client.HTTPConnection(str(server.address.hostname), server.address.port or 80)
        while not ends.wait(0.005):
            began = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            took.append(time.monotonic() - began)

    asking = threading.Thread(target=ask_again)
    asking.start()
    try:
        yield took
    finally:
        ends.set()
        asking.join()


def measure(case: Case, arguments: list[str]) -> str:
    """A line with what the case cost."""
    with Server(arguments) as server:
        ask(server, Case("warm up", case.path, case.body | {"n": 1, "max_tokens": min(2, case.body["max_tokens"])}), Seen())
        before = server.memory("VmRSS")
        server.reset_peaks()
        seen = Seen()
        with asked_for_health(server) as took:
            clients = [threading.Thread(target=ask, args=(server, case, seen)) for _ in range(case.num_clients)]
            for client in clients:
                client.start()
            held = 0.0
            while any(client.is_alive() for client in clients):
                time.sleep(0.2)
                held = server.memory("VmRSS")["server"]
        peaks = server.memory("VmHWM")
        rise = {name: peaks[name] - before[name] for name in peaks}
        statuses = ", ".join(f"{seen.statuses.count(status)} x {status}" for status in sorted(set(seen.statuses)))
        return (
            f"{case.name}: {seen.num_bytes / MIB:.1f} MiB read ({statuses}); server +{rise['server']:.0f} MiB at the peak, "
            f"+{held - before['server']:.0f} at the end, engine +{rise['engine']:.0f}; /health at most "
            f"{1000 * max(took):.0f} ms"
        )


def measure_shapes(arguments: list[str]) -> None:
    """Bytes for a token of an answer, in each shape."""
    with Server(arguments) as server:
        for num_top in (None, 0, 1, 5, 20):
            for shape in ("completion", "echo", "chat"):
                body: dict[str, Any] = {"n": 8, "max_tokens": 400, "ignore_eos": True, "seed": 1}
                params = SamplingParams(n=8, logprobs=num_top)
                if shape == "chat":
                    path, expected = "/v1/chat/completions", json_bytes(params, 1, 3200, CHAT, False)
                    body |= {"messages": [{"role": "user", "content": "Tell me a story."}], "logprobs": num_top is not None}
                    body |= {"top_logprobs": num_top} if num_top is not None else {}
                else:
                    path, expected = "/v1/completions", json_bytes(params, 1, 3200, COMPLETION, False)
                    body |= {"prompt": [5], "logprobs": num_top}
                if shape == "echo":
                    params = SamplingParams(n=8, prompt_logprobs=num_top)
                    expected = json_bytes(params, 400, 0, COMPLETION, True)
                    body |= {"prompt": tokens_of(server, 400), "echo": True, "max_tokens": 0}
                got = len(posted(server, path, body))
                print(f"{shape}, {num_top}: {got / 3200:.1f} bytes a token, expected {expected / 3200:.1f}", flush=True)


def tokens_of(server: Server, count: int) -> list[int]:
    """Token ids of a story."""
    body = {"prompt": [5], "max_tokens": count, "ignore_eos": True, "seed": 2}
    text = json.loads(posted(server, "/v1/completions", body))["choices"][0]["text"]
    return list(json.loads(posted(server, "/tokenize", {"prompt": text}))["tokens"])[:count]


def posted(server: Server, path: str, body: dict[str, Any]) -> bytes:
    """The body of the answer."""
    connection = http.client.HTTPConnection(str(server.address.hostname), server.address.port or 80)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"{path} answered {answer.status}: {answer.read().decode()}")
    return answer.read()


def main() -> None:
    """Measure the cases whose names hold the given text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--shapes", action="store_true", help="bytes of JSON for a token instead")
    parser.add_argument("arguments", nargs="*", help="more options for the server, after --")
    args = parser.parse_args()
    if args.shapes:
        measure_shapes(args.arguments)
        return
    for case in CASES:
        if args.only in case.name:
            print(measure(case, args.arguments), flush=True)


if __name__ == "__main__":
    main()
