"""The clients of one process: they send requests and record the time of each chunk of the answers, at low cost.

With 256 streams at 50,000 tokens a second an event may cost 20 microseconds at most. So nothing is parsed here: request
bodies are made before the run, answers are kept as bytes (some 300 for each event), and
:mod:`~pagebrain.bench.serve.measurements` reads them after the run.
"""

import asyncio
import json
import time
from typing import Protocol

import aiohttp

from pagebrain.bench.serve.load import ClientJob
from pagebrain.bench.serve.measurements import Exchange, error_message

_REFUSING = (429, 503)
_MAX_ERROR_BYTES = 65_536
_IDLE_CONNECTION_S = 2.0
"""Idle connections are closed after this time. A server closes them later (uvicorn after 5 s), which can lose a request."""


class Counters(Protocol):
    """Counters that the clients share with the process that shows the progress."""

    def take_next(self) -> int:
        """The next request of a closed loop. Each number is returned once."""

    def count_tokens(self, number: int) -> None:
        """Add received tokens; a negative number corrects an earlier count."""

    def count_ended(self) -> None:
        """Count a request that has ended: done, failed or refused."""


def open_session(job: ClientJob) -> aiohttp.ClientSession:
    """A session without a limit of connections, which are kept alive. Call it in a running event loop."""
    own = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        timeout=aiohttp.ClientTimeout(total=job.timeout_s),
        headers=own | job.headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


async def warm_up(session: aiohttp.ClientSession, job: ClientJob) -> list[Exchange]:
    """Send the warm-up and return the answers."""
    todo = iter(range(len(job.warmup)))

    async def client() -> list[Exchange]:
        return [await exchange(session, job.url, job.warmup[index], index, None, None) for index in todo]

    return sum(await asyncio.gather(*(client() for _ in range(job.num_clients))), [])


async def drive(session: aiohttp.ClientSession, job: ClientJob, start_s: float, counters: Counters) -> list[Exchange]:
    """Send this process's requests from ``start_s`` (of ``perf_counter``) on, and return the answers."""
    if job.arrivals_s is None:
        await _sleep_until(start_s)
        return sum(await asyncio.gather(*(_client(session, job, counters) for _ in range(job.num_clients))), [])
    sent = []
    for index, arrival_s in job.arrivals_s.items():
        await _sleep_until(start_s + arrival_s)
        one = exchange(session, job.url, job.bodies[index], index, start_s + arrival_s, counters)
        sent.append(asyncio.ensure_future(one))
    return list(await asyncio.gather(*sent))


async def _client(session: aiohttp.ClientSession, job: ClientJob, counters: Counters) -> list[Exchange]:
    """One client of a closed loop."""
    ended = []
    while (index := counters.take_next()) < len(job.bodies):
        ended.append(await exchange(session, job.url, job.bodies[index], index, None, counters))
    return ended


async def exchange(
    session: aiohttp.ClientSession, url: str, body: bytes, index: int, scheduled_s: float | None, counters: Counters | None
) -> Exchange:
    """Send one request and keep the answer. An error is stored in the exchange and not raised. A warm-up is not counted."""
    sent_s = time.perf_counter()
    result = Exchange(index, sent_s if scheduled_s is None else scheduled_s, sent_s)
    counted = 0
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                result.is_refused = response.status in _REFUSING and "Retry-After" in response.headers
                result.error = f"HTTP {response.status}: {await _error_text(response)}"
            else:
                counted = await _keep_chunks(response.content, result, counters)
    except asyncio.TimeoutError:
        result.error = f"no end after {session.timeout.total:g} s"
    except aiohttp.ClientPayloadError:
        result.error = "the connection ended in the middle of the answer"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    result.ended_s = time.perf_counter()
    if counters is not None:
        counters.count_tokens(_usage(result.chunks, counted) - counted)
        counters.count_ended()
    return result


async def _keep_chunks(content: aiohttp.StreamReader, result: Exchange, counters: Counters | None) -> int:
    """Store the chunks with their times. Returns an approximate number of events, for the progress bar."""
    clock, arrivals_s, chunks = time.perf_counter, result.arrivals_s, result.chunks
    count_tokens = (lambda number: None) if counters is None else counters.count_tokens
    counted = 0
    while chunk := await content.readany():
        arrivals_s.append(clock())
        chunks.append(chunk)
        number = chunk.count(b"data:")
        counted += number
        count_tokens(number)
    return counted


def _usage(chunks: list[bytes], default: int) -> int:
    """The server's count of tokens, from the end of the answer, or ``default``."""
    _, found, rest = b"".join(chunks[-3:]).rpartition(b'"completion_tokens":')
    digits = rest.lstrip()[:12].partition(b",")[0].partition(b"}")[0].strip()
    return int(digits) if found and digits.isdigit() else default


async def _error_text(response: aiohttp.ClientResponse) -> str:
    """The message in OpenAI's error object, or else the body as text."""
    text = (await response.content.read(_MAX_ERROR_BYTES)).decode(errors="replace")
    try:
        return error_message(json.loads(text))
    except ValueError:
        return text or str(response.reason)


async def _sleep_until(when_s: float) -> None:
    delay_s = when_s - time.perf_counter()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
