"""Chapter 05: the engine behind HTTP.

So far one caller had all prompts at the start and waited for the last answer. On a server, people come when they like, want
each word as soon as it is there, and leave in mid-sentence. The engine of chapter 04 can do all of that between two of its
steps; what is missing is someone who drives it.

Two things happen at once then: the engine computes, and connections come and go. They meet in one place. A step runs in a
thread, so that the event loop stays free for the network, and while it runs nobody touches the engine. Who comes or goes
meanwhile leaves a *note*, and the loop reads the notes between two steps. That is all the locking there is.

What changes from chapter 04: nobody calls ``engine.step`` in a plain loop any more. Scheduler, cache and attention stay.

Tasks (30 points, about 5 hours):

- 5.1 (7 points) ``AsyncEngine.read_notes``: let in who arrived and let go who left.
- 5.2 (6 points) ``AsyncEngine.deliver``: each new token to the client that waits for it.
- 5.3 (8 points) ``AsyncEngine.run``: the loop, which sleeps when there is nothing to do and fails loudly.
- 5.4 (9 points) ``AsyncEngine.stream``: one client's tokens as they come, and no blocks held after it has gone.

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
    """Somebody who waits for tokens.

    Attributes:
        prompt, max_new_tokens: what was asked for.
        tokens: gets each new token, then ``None`` after the last one; or the exception that ended the engine.
        seq: the client's sequence in the engine, once it was let in.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    tokens: "asyncio.Queue[int | Exception | None]" = field(default_factory=asyncio.Queue)
    seq: data.Sequence | None = None


class AsyncEngine:
    """An engine that many clients share, all on one event loop.

    Attributes:
        engine: changed by :meth:`read_notes` and by the step itself, and by nobody while a step is under way. To look at
            what never changes, as :meth:`Engine.check_request` does, is always safe.
        clients: those that the engine serves, by sequence id.
        arrived, left: the notes, in the order in which they were left.
        note: set whenever there is a new one.
        failure: what ended the engine, if anything did.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.clients: dict[int, Client] = {}
        self.arrived: list[Client] = []
        self.left: list[Client] = []
        self.note = asyncio.Event()
        self.failure: Exception | None = None

    def read_notes(self) -> None:
        """Task 5.1: act on all notes, and throw each away when that is done: if it fails, nobody's note may be lost.

        Whoever arrived becomes a request of the engine (``client.seq``) and stands in ``clients``. Whoever left stands there
        no longer; if its sequence has not finished, :meth:`Engine.finish` ends it. A client may arrive and leave between
        the same two steps, and it may leave after its last token, when :meth:`deliver` has taken it out already.
        """
        # BEGIN SOLUTION 5.1
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()
        # END SOLUTION

    def deliver(self, group: SequenceGroup) -> None:
        """Task 5.2: put each token that the step sampled into its client's queue, and ``None`` after a sequence's last.

        A finished client is taken out of ``clients``. An entry that does not sample, a prompt's chunk with more to come,
        brings nothing.
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
        """Task 5.3: the loop, until it is cancelled: read the notes, compute a step in a thread, deliver.

        ``asyncio.to_thread(self.engine.step)`` is the step; it gives ``None`` if there is nothing to compute, and then the
        loop sleeps until there is a note. A note that was left while that step ran counts too. If a step raises, or
        anything else in the loop, nobody is left waiting: the exception is kept in ``failure``, put into the queue of every
        client, let in or not, and raised again. To be cancelled is no failure.
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
        """Task 5.4: the tokens of one request, each as soon as it is there.

        Leaves a note that a client arrived, yields what comes into its queue, and leaves a note that it left, however it
        ends: after the last token, or because whoever reads was cancelled or closes the generator. Raises ``ValueError``
        for a request that could never be served (:meth:`Engine.check_request`), before any note, and ``EngineFailedError``
        if the engine has failed or fails.
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
            self.left.append(client)
            self.note.set()
        # END SOLUTION


class GenerateBody(BaseModel):
    """What ``POST /generate`` takes, as JSON."""

    prompt: str
    max_new_tokens: int = 100


def create_app(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """The server: ``POST /generate`` streams server-sent events, ``GET /health`` says who is being served."""
    detokenizer = Detokenizer(tokenizer)
    shared = AsyncEngine(engine)

    def ended(loop: "asyncio.Task[None]") -> None:
        if not loop.cancelled() and isinstance(error := loop.exception(), Exception):
            shared.failure = error  # whatever run made of it
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
        try:  # here already: a generator would raise with its first token, when status 200 has been sent
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
    """The greedy continuation of each prompt, each asked for by a client of its own, all at the same time."""
    check_prompts(model, prompts, max_new_tokens)
    engine = Engine(model, config or half_the_room(model, prompts, max_new_tokens), on_logits, on_step=on_step)

    async def serve() -> list[list[int]]:
        shared = AsyncEngine(engine)

        async def ask(prompt: Sequence[int]) -> list[int]:
            return [token_id async for token_id in shared.stream(prompt, max_new_tokens)]

        loop = asyncio.create_task(shared.run())
        answers = asyncio.gather(*map(ask, prompts))
        loop.add_done_callback(lambda _: answers.cancel())  # it ends by failing, and then nobody is served any more
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
