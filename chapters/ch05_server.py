"""Chapter 05: the engine behind HTTP.

So far one caller had all prompts at the start and waited for the last answer. On a server, requests arrive at any time. Each
client wants each token as soon as it is computed, and a client may leave before its answer is complete. The engine of
chapter 04 can add and end sequences between two of its steps. What is missing is the loop that drives it.

Two things happen at the same time then: the engine computes, and connections come and go. A step runs in a thread, so that
the event loop stays free for the network. While a step runs, nothing else touches the engine. A client that arrives or
leaves meanwhile writes a *note*, and the loop reads the notes between two steps. No lock is needed.

What changes from chapter 04: the loop around ``engine.step``. Scheduler, cache and attention stay.

Tasks (33 points, about 3.5 hours):

- 5.1 (7 points) ``AsyncEngine.read_notes``: add the clients that arrived and end the sequences of those that departed.
- 5.2 (6 points) ``AsyncEngine.deliver``: each new token to the client that waits for it.
- 5.3 (8 points) ``AsyncEngine.run``: the loop, which sleeps when there is nothing to do and tells each client of a failure.
- 5.4 (9 points) ``AsyncEngine.stream``: one client's tokens as they come, and no blocks held after it has gone.
- 5.5 (3 points) ``answer_5_5``: measure how many steps a client waits for its first token, and explain it.

The time is for a reader who has used ``asyncio`` before. With only ``async`` and ``await``, allow 4.5 to 5 hours.

Run it from the repository's root with ``python -m chapters.ch05_server``, and yours with ``python -m work.ch05_server``.
Know first: chapter 04; ``async`` functions, generators, ``try`` and ``finally``.
In the engine: :mod:`pagebrain.server.link.engine_main` and :mod:`pagebrain.server.link.client`. In vLLM: ``AsyncLLM`` in
``vllm/v1/engine/async_llm.py``, whose engine runs in a process of its own, and ``vllm/entrypoints/openai/api_server.py``.
From pagebrain: ``PageBrainConfig``, ``SamplingParams``, ``detokenizer``, ``loading``, ``Sequence`` and ``SequenceGroup``,
``Observer``.
"""

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from chapters.ch00_baseline import OnLogits, check_prompts
from chapters.ch04_scheduler import Engine, half_the_room
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.engine import sequence as data
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.engine.sequence import SequenceGroup
from pagebrain.engine.trace import Observer
from pagebrain.models.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)


class EngineFailedError(Exception):
    """A step failed. Its cause is the exception that the step raised; nothing can be served any more."""


@dataclass(eq=False)
class Client:
    """One request and its token queue.

    Attributes:
        prompt, max_new_tokens: what was asked for.
        tokens: the token queue. Its items are the tokens, each put in when it is new, and ``None`` after them when the
            sequence has finished; or the exception that ended the engine.
        seq: the client's sequence in the engine; ``None`` until its arrival was read. ``seq.is_finished`` says whether it
            has ended, after its last token or by :meth:`Engine.finish`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    tokens: "asyncio.Queue[int | Exception | None]" = field(default_factory=asyncio.Queue)
    seq: data.Sequence | None = None


class AsyncEngine:
    """An engine that many clients share, all on one event loop.

    Attributes:
        engine: changed by :meth:`read_notes` and by the step itself, and by nothing else while a step is under way.
            :meth:`Engine.check_request` reads only what never changes, so it may be called at any time.
        clients: the clients that the engine serves, keyed by sequence id, ``seq.seq_id``. :meth:`read_notes` and
            :meth:`deliver` change it.
        arrived, departed: the notes, oldest first. A note is the client itself.
        note: an event that is set whenever a note is added.
        failure: the exception that ended the engine; ``None`` while it works.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.clients: dict[int, Client] = {}
        self.arrived: list[Client] = []
        self.departed: list[Client] = []
        self.note = asyncio.Event()
        self.failure: Exception | None = None

    def read_notes(self) -> None:
        """Task 5.1: act on all notes. Afterwards both lists are empty.

        After a client's arrival was read, the engine has its request, ``client.seq`` is the sequence, and the client is in
        ``clients``. Requests are added in the order of the notes. After a departure was read, the client is not in
        ``clients``, and its sequence has finished and holds no blocks. A sequence is ended by :meth:`Engine.finish`, at most
        once; ``seq.is_finished`` says whether it has ended already. One client can have both notes at the same time. A
        departure can also come after the client's last token, when the sequence has finished and :meth:`deliver` has taken
        the client out of ``clients``.

        If the engine raises, so does this method, and no note is lost: each client whose arrival was noted is in ``arrived``
        or in ``clients``, and each departure whose sequence was not ended is in ``departed``.
        """
        # BEGIN SOLUTION 5.1
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()
        # END SOLUTION

    def deliver(self, group: SequenceGroup) -> None:
        """Task 5.2: put each token that the step sampled into its client's token queue, and ``None`` after the final one.

        The group has an entry for each sequence of the step. If the entry samples, the new token is ``seq.token_ids[-1]`` of
        its sequence, ``entry.seq``. If the sequence has finished, ``seq.is_finished``, put ``None`` after it and take the
        client out of ``clients``. An entry that does not sample brings nothing; it is a chunk with more to come. Every token
        id is delivered, 0 and the end-of-text token too. Token queues have no limit, so ``put_nowait`` never fails.
        """
        # BEGIN SOLUTION 5.2
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]
        # END SOLUTION

    async def run(self) -> None:
        """Task 5.3: the loop. It reads the notes, computes a step, delivers its tokens, and goes on until it is cancelled.

        A step, ``self.engine.step``, runs in a thread (``asyncio.to_thread``), one at a time, for as long as it takes. The
        event loop is never blocked. All else happens on the event loop, between two steps. A step gives ``None`` if there is
        nothing to compute. Then the loop sleeps, without timers, until there is a note of either kind. If a note was
        written during that step, the loop must not sleep: it must read the note.

        If a step or anything else in the loop raises an ``Exception``, this exception is kept in ``failure``, put into the
        token queue of every client in ``clients`` and in ``arrived``, and raised again. A cancellation is no failure. It
        ends the loop immediately and is passed on.
        """
        # BEGIN SOLUTION 5.3
        try:
            while True:
                self.note.clear()  # before the notes are read: one that comes later sets it again
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise
        # END SOLUTION

    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        """Task 5.4: the tokens of one request, each as soon as it is in the client's token queue.

        It adds a note to ``arrived`` and yields what comes into the token queue until ``None`` comes. It adds exactly one
        note to ``departed``, however it ends: after the last token, because the engine fails, because the reader's task is
        cancelled, or because the reader closes the generator. A cancellation is passed on. The stream waits for each token
        for as long as it takes. Apart from :meth:`Engine.check_request` it does not touch the engine and ``clients``, since
        a step may be under way.

        Raises ``ValueError`` for a request that could never be served, before any note, and ``EngineFailedError``, whose
        cause is the engine's exception, if the engine has failed already or fails. If both apply, either is right. The texts
        of the exceptions are free.
        """
        # BEGIN SOLUTION 5.4
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()
        # END SOLUTION


class GenerateBody(BaseModel):
    """What ``POST /generate`` takes, as JSON."""

    prompt: str
    max_new_tokens: int = 100


def create_app(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """The server: ``POST /generate`` streams server-sent events, ``GET /health`` counts clients and free blocks."""
    detokenizer = Detokenizer(tokenizer)
    shared = AsyncEngine(engine)

    def ended(loop: "asyncio.Task[None]") -> None:
        if not loop.cancelled() and isinstance(error := loop.exception(), Exception):
            shared.failure = error  # also if run did not keep it
            logger.critical("the engine has stopped", exc_info=error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.create_task(shared.run())
        loop.add_done_callback(ended)
        yield
        loop.cancel()

    app = FastAPI(title="PageBrain, chapter 05", lifespan=lifespan)

    async def events(prompt: list[int], max_new_tokens: int) -> AsyncIterator[str]:
        text = detokenizer.stream(SamplingParams())
        try:
            async with aclosing(shared.stream(prompt, max_new_tokens)) as tokens:
                async for token_id in tokens:
                    yield event({"token_id": token_id, "text": text.append(token_id)})
            yield event({"token_id": None, "text": text.finish()})
        except EngineFailedError as error:
            yield event({"error": f"{error}: {error.__cause__}"})
        yield "data: [DONE]\n\n"

    @app.post("/generate")
    async def generate(body: GenerateBody) -> StreamingResponse:
        prompt = tokenizer.encode(body.prompt)
        try:  # a generator would raise with its first token only, after status 200 was sent
            engine.check_request(prompt, body.max_new_tokens)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        if shared.failure is not None:
            raise HTTPException(503, f"the engine has stopped: {shared.failure}")
        return StreamingResponse(events(prompt, body.max_new_tokens), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if shared.failure is not None:
            raise HTTPException(503, f"the engine has stopped: {shared.failure}")
        clients = len(shared.clients) + len(shared.arrived)
        return {"ok": True, "clients": clients, "free_blocks": engine.cache.num_free_blocks}

    return app


def event(fields: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    config: PageBrainConfig | None = None,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt. Each prompt has a client of its own, and all clients ask at the same time."""
    check_prompts(model, prompts, max_new_tokens)
    engine = Engine(model, config or half_the_room(model, prompts, max_new_tokens), on_logits, on_step=on_step)

    async def serve() -> list[list[int]]:
        shared = AsyncEngine(engine)

        async def ask(prompt: Sequence[int]) -> list[int]:
            return [token_id async for token_id in shared.stream(prompt, max_new_tokens)]

        loop = asyncio.create_task(shared.run())
        answers = asyncio.gather(*map(ask, prompts))
        loop.add_done_callback(lambda _: answers.cancel())  # it ends only by failing, and then no client is served
        try:
            return await answers
        except (asyncio.CancelledError, EngineFailedError):
            if loop.done():
                loop.result()  # raises what ended it
            raise
        finally:
            loop.cancel()

    with ThreadPoolExecutor(1) as pool:  # where an event loop is running already, a notebook's, a second one needs a thread
        return pool.submit(asyncio.run, serve()).result()


def answer_5_5() -> tuple[float, str]:
    """Task 5.5: how many steps does a client wait for its first token?

    The engine has 256 blocks of 16 tokens, 8 seats and a budget of 64 tokens a step. Seven clients are served. Each has
    some of its tokens and needs many more. While a step is computing, an eighth client arrives. Its prompt has 300 tokens.

    Return the number of steps from its note until its first token is in its token queue. The step that is computing when the
    note is written counts, and so does the step that samples the token. Measure it: no thread is needed, since you can call
    ``read_notes``, ``engine.step`` and ``deliver`` by hand, in the order of the loop, and write the note between
    ``read_notes`` and ``engine.step``. Any GPT-2 with 320 positions or more will do, also one with random weights.

    Return also one to four sentences for your instructor, at least 8 different words: which steps these are, and what would
    make the wait shorter for this client, and at whose cost.
    """
    # BEGIN SOLUTION 5.5
    return 7, (
        "The note is read only after the step that is computing, so it is the first. Then seven decodes take 7 of the "
        "64 tokens in every step, 57 remain, and 300 prompt tokens need six chunks. A larger budget would need fewer "
        "steps, but each would take longer, and the seven other clients would wait longer for each token."
    )
    # END SOLUTION


def main() -> None:
    """Serve the bundled story model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    settings = PageBrainConfig()
    model, tokenizer = load_model(settings), load_tokenizer(settings)
    assert tokenizer is not None
    config = PageBrainConfig.for_model(model, num_blocks=256, max_num_seqs=32, max_num_batched_tokens=128)
    uvicorn.run(create_app(Engine(model, config, keep_history=False), tokenizer), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
