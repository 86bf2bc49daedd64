"""Client processes, one or several. The progress bar is drawn by their parent, so that drawing delays no timestamp.

Each process warms up and reports that. When all are warm, they start at the same moment. A closed loop's clients take their
next request from a counter that all processes share. Processes end with their parent, even if it is killed.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pagebrain.bench.serve.load import ClientJob, Load
from pagebrain.bench.serve.measurements import RequestRecord, read_exchange
from pagebrain.bench.serve.target import Target
from pagebrain.errors import PageBrainError
from pagebrain.machine import allow_many_connections

_START_DELAY_S = 0.1
"""From the last process that is ready to the start of the load. The message with the start time takes less."""

_POLL_S = 0.2
_SPAWN = multiprocessing.get_context("spawn")  # a fork inherits the locks of torch's threads without the threads


@dataclass(frozen=True)
class DriveResult:
    """The records of all clients, in the order of the requests.

    ``busy`` is the share of one core that each client process used during the load. Near 1, the clients may have limited the
    figures. ``warmup_failures`` are reasons.
    """

    records: list[RequestRecord]
    busy: list[float]
    warmup_failures: list[str]


@dataclass(frozen=True)
class Progress:
    """The progress of a run. ``num_tokens`` counts usage for requests that ended, and events for those in flight."""

    num_ended: int
    num_tokens: int


def drive_processes(
    target: Target,
    bodies: Sequence[bytes],
    warmup: Sequence[bytes],
    load: Load,
    *,
    seed: int,
    num_processes: int,
    timeout_s: float,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> DriveResult:
    """Put ``load`` on the server and wait until every request has ended.

    Raises ``PageBrainError`` if a client process dies; requests that fail are in the result.
    """
    whole = ClientJob(
        url=f"{target.url}/v1/completions",
        headers=target.headers,
        bodies=list(bodies),
        warmup=list(warmup),
        num_clients=load.concurrency or max(1, len(warmup)),
        arrivals_s=load.arrivals_s(len(bodies), seed),
        timeout_s=timeout_s,
    )
    jobs = whole.split(num_processes)
    shared = SharedCounters(len(jobs))
    with _started(jobs, shared) as pipes:
        failures = [reason for pipe in pipes for reason in _receive(pipe)]
        start_s = time.perf_counter() + _START_DELAY_S  # one clock for all processes of a machine
        for pipe in pipes:
            pipe.send(start_s)
        waiting = list(pipes)
        while waiting:
            for ready in wait(waiting, timeout=_POLL_S):
                assert isinstance(ready, Connection)
                _receive(ready)
                waiting.remove(ready)
            on_progress(shared.progress())
        for pipe in pipes:  # after all have ended: parsing in one process would slow the others down
            pipe.send("read the answers")
        results = [_receive(pipe) for pipe in pipes]
    records = sorted((record for found, _ in results for record in found), key=lambda record: record.index)
    return DriveResult(records, [busy for _, busy in results], failures)


@contextlib.contextmanager
def _started(jobs: Sequence[ClientJob], shared: "SharedCounters") -> Iterator[list[Connection]]:
    """Start the processes and yield their pipes. They are ended at the end of the block."""
    processes, pipes = [], []
    try:
        for number, job in enumerate(jobs):
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_client_process, args=(there, job, shared, number), daemon=True)
            process.start()
            there.close()  # so that reading here fails when the process dies
            processes.append(process)
            pipes.append(here)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        raise PageBrainError("a client process of the benchmark died; what it printed stands above") from None


class SharedCounters:
    """Counters in shared memory. Each process has its own counts of tokens and ends; only ``take_next`` needs a lock."""

    def __init__(self, num_processes: int) -> None:
        self._next: Any = _SPAWN.Value("q", 0)
        self._tokens: Any = _SPAWN.RawArray("q", num_processes)
        self._ended: Any = _SPAWN.RawArray("q", num_processes)
        self.process = 0

    def take_next(self) -> int:
        """The next number, from 0 on. No two calls return the same one."""
        with self._next.get_lock():
            taken = int(self._next.value)
            self._next.value = taken + 1
        return taken

    def count_tokens(self, number: int) -> None:
        """Add to this process's count of tokens."""
        self._tokens[self.process] += number

    def count_ended(self) -> None:
        """Add one to this process's count of ended requests."""
        self._ended[self.process] += 1

    def progress(self) -> Progress:
        """The sums over all processes."""
        return Progress(num_ended=sum(self._ended), num_tokens=sum(self._tokens))


def _client_process(pipe: Connection, job: ClientJob, shared: SharedCounters, number: int) -> None:
    """The main function of a client process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    shared.process = number
    allow_many_connections()  # a rate of ``inf`` opens a connection for each request
    loop = _new_event_loop()
    try:
        loop.run_until_complete(_talk(pipe, job, shared))
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the parent has ended or closed the pipe
    finally:
        loop.close()


async def _talk(pipe: Connection, job: ClientJob, shared: SharedCounters) -> None:
    """Warm up, wait for the start time, send the load, wait, parse the answers. Waiting may block the idle loop."""
    from pagebrain.bench.serve.http_client import drive, open_session, warm_up

    async with open_session(job) as session:
        warmed = [read_exchange(one, 0.0) for one in await warm_up(session, job)]
        pipe.send([record.reason for record in warmed if record.outcome != "done"])
        start_s = pipe.recv()
        gc.collect()
        gc.freeze()  # so that the collector skips all existing objects during the load
        busy_s, began_s = time.process_time(), time.perf_counter()
        exchanges = await drive(session, job, start_s, shared)
        busy = (time.process_time() - busy_s) / (time.perf_counter() - began_s)
    pipe.send("ended")
    pipe.recv()
    pipe.send(([read_exchange(one, start_s) for one in exchanges], busy))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's if it is installed: its events cost about 30 % less."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


Follow = Callable[[str, int, Progress], None]
"""Called with the load's name, its number of requests, and its progress."""


@contextlib.contextmanager
def progress_bar(console: Any) -> Iterator[Follow]:
    """A progress bar on ``console``; yields the function that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
    with Bar(*columns, TimeElapsedColumn(), TextColumn("{task.fields[speed]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, speed="")
        last = Progress(0, 0)

        def follow(label: str, total: int, progress: Progress) -> None:
            nonlocal last
            if progress.num_ended < last.num_ended or bar.tasks[0].description != label:
                bar.reset(task, description=label, total=total)
            last = progress
            elapsed_s = bar.tasks[0].elapsed or 0.0
            speed = f"{progress.num_tokens / elapsed_s:,.0f} tokens/s so far" if elapsed_s > 0.5 else ""
            bar.update(task, completed=progress.num_ended, speed=speed)

        yield follow
