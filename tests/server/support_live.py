"""A stand-in for the engine that the live view can be tried against: blocks, queues and preemptions, but no model.

``python -m tests.server.support_live`` serves the page with it, for work on the page. Its updates have the form of
:class:`pagebrain.server.live.feed.LiveFeed`'s, and its ``/v1/completions`` streams words, so that the page needs no more.
"""

import argparse
import asyncio
import contextlib
import json
import random
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse

from pagebrain.config import PageBrainConfig
from pagebrain.server.api.service import SECRET_HEADER
from pagebrain.server.error_responses import ApiError, add_error_handlers
from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.link.messages import ControlAction
from pagebrain.server.live.routes import live_router
from pagebrain.server.options import ServerOptions

WORDS = "the little fox found a lamp in the old garden and her friend said that every night has its own small light".split()


@dataclass
class Seq:
    """A sequence of the simulation."""

    seq_id: int
    request_id: str
    sample: int
    num_tokens: int
    num_wanted: int
    num_cached: int = 0
    table: list[int] = field(default_factory=list)
    was_preempted: bool = False
    words: int = 0


class Simulation:
    """Continuous batching with chunked prefill and preemption by recompute, over numbers alone. The same at every run."""

    def __init__(self, num_blocks: int = 128, block_size: int = 16, max_num_seqs: int = 16, budget: int = 96) -> None:
        self.num_blocks, self.block_size, self.max_num_seqs, self.budget = num_blocks, block_size, max_num_seqs, budget
        self.free = list(range(num_blocks))
        random.Random(3).shuffle(self.free)
        self.refs: dict[int, int] = {}
        self.waiting: list[Seq] = []
        self.running: list[Seq] = []
        self.num_steps = self.num_prefill = self.num_decode = self.num_preemptions = self.num_seqs = 0

    def add(self, request_id: str, num_prompt: int, num_new: int, samples: int = 1) -> list[Seq]:
        """A request; its samples are sequences of their own, which share the prompt's full blocks."""
        seqs = []
        for sample in range(samples):
            seqs.append(Seq(self.num_seqs, request_id, sample, num_prompt, num_prompt + num_new))
            self.num_seqs += 1
        self.waiting.extend(seqs)
        return seqs

    def abort(self, request_id: str) -> list[Seq]:
        """End a request."""
        gone = [seq for seq in self.waiting + self.running if seq.request_id == request_id]
        for seq in gone:
            self.release(seq)
            (self.waiting if seq in self.waiting else self.running).remove(seq)
        return gone

    def release(self, seq: Seq) -> None:
        """Give its blocks back."""
        for block in seq.table:
            self.refs[block] -= 1
            if self.refs[block] == 0:
                del self.refs[block]
                self.free.append(block)
        seq.table, seq.num_cached = [], 0

    def step(self) -> dict[str, Any] | None:
        """One step, as the feed tells it; ``None`` if there is nothing to do."""
        rows: list[list[int]] = []
        preempted: list[int] = []
        budget = self.budget
        for seq in list(self.running):
            if seq not in self.running or budget == 0:
                continue
            count = min(seq.num_tokens - seq.num_cached, budget)
            while seq in self.running and not self._cover(seq, count):
                victim = self.running.pop()
                rows = [row for row in rows if row[0] != victim.seq_id]
                self.release(victim)
                victim.was_preempted = True
                self.waiting.insert(0, victim)
                preempted.append(victim.seq_id)
                self.num_preemptions += 1
            if seq in self.running:
                rows.append([seq.seq_id, seq.num_cached, count, int(count == 1 and seq.num_cached > 0)])
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not preempted:
            seq = self.waiting[0]
            self._share(seq)
            count = min(seq.num_tokens - seq.num_cached, budget)
            if not self._cover(seq, count):
                self.release(seq)
                break
            self.running.append(self.waiting.pop(0))
            seq.was_preempted = False
            rows.append([seq.seq_id, seq.num_cached, count, 0])
            budget -= count
        return self._apply(rows, preempted) if rows or preempted else None

    def _share(self, seq: Seq) -> None:
        """Start with the full prompt blocks of a sample of the same request that has them."""
        for other in self.running:
            if other.request_id == seq.request_id and other.num_cached:
                full = min(other.num_cached, seq.num_tokens - 1) // self.block_size
                seq.table = other.table[:full]
                seq.num_cached = full * self.block_size
                for block in seq.table:
                    self.refs[block] += 1
                return

    def _cover(self, seq: Seq, count: int) -> bool:
        need = -(-(seq.num_cached + count) // self.block_size) - len(seq.table)
        if need > len(self.free):
            return False
        for _ in range(need):
            block = self.free.pop(0)
            self.refs[block] = 1
            seq.table.append(block)
        return True

    def _apply(self, rows: list[list[int]], preempted: list[int]) -> dict[str, Any]:
        finished = []
        seqs = {seq.seq_id: seq for seq in self.running}
        decodes = sum(is_decode for *_, is_decode in rows)
        for seq_id, _, count, _ in rows:
            seq = seqs[seq_id]
            seq.num_cached += count
            if seq.num_cached == seq.num_tokens:
                seq.num_tokens += 1
                seq.words += 1
            if seq.num_tokens >= seq.num_wanted:
                finished.append(seq_id)
                self.release(seq)
                self.running.remove(seq)
        self.num_steps += 1
        self.num_decode += decodes
        prefills = sum(count for _, _, count, _ in rows) - decodes
        self.num_prefill += prefills
        return {
            "step": self.num_steps - 1,
            "launched_s": time.monotonic(),
            "ms": 3.0,
            "prefill_tokens": prefills,
            "decode_tokens": decodes,
            "rows": rows,
            "preempted": preempted,
            "finished": finished,
        }

    def state(self) -> dict[str, Any]:
        """How things stand, as the feed tells it."""
        holders = [seq for seq in self.running if seq.table]
        return {
            "step": self.num_steps - 1,
            "free_blocks": len(self.free),
            "next_free": self.free[:32],
            "tables": {str(seq.seq_id): list(seq.table) for seq in holders},
            "shared": {str(block): count for block, count in self.refs.items() if count > 1},
            "waiting": [seq.seq_id for seq in self.waiting],
            "running": [seq.seq_id for seq in self.running],
            "preempted": [seq.seq_id for seq in self.waiting if seq.was_preempted],
            "context": {str(seq.seq_id): seq.num_cached for seq in holders},
            "requests": {str(seq.seq_id): [seq.request_id, seq.sample] for seq in self.running + self.waiting},
        }

    def totals(self) -> dict[str, int]:
        """Counts since the start, as the feed tells them."""
        return {
            "steps": self.num_steps,
            "prefill_tokens": self.num_prefill,
            "decode_tokens": self.num_decode,
            "preemptions": self.num_preemptions,
        }


class FakeSubscription:
    """Every update at once, one by one: slower than ten a second is the hub's affair."""

    def __init__(self, client: "FakeClient") -> None:
        self.updates: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._client = client

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while (update := await self.updates.get()) is not None:
            yield update

    def close(self) -> None:
        """Watch no more."""
        self._client.subscriptions.discard(self)


class FakeClient:
    """What the live view uses of ``EngineClient``, around a simulation that steps by itself.

    Attributes:
        subscriptions: those that watch now.
        most_subscriptions: how many there were at a time, at most.
        actions: what was asked of :meth:`control`.
        secrets: who knows a request's may stop it.
    """

    def __init__(self, simulation: Simulation, steps_per_s: float = 50.0, traffic: bool = True) -> None:
        self.simulation = simulation
        self.steps_per_s = steps_per_s
        self.traffic = traffic
        self.config = PageBrainConfig(
            num_blocks=simulation.num_blocks,
            block_size=simulation.block_size,
            max_num_seqs=simulation.max_num_seqs,
            max_num_batched_tokens=simulation.budget,
            max_model_len=min(1024, simulation.num_blocks * simulation.block_size),
        )
        self.is_alive = True
        self.is_draining = False
        self.paused = False
        self.failure: str | None = None
        self.subscriptions: set[FakeSubscription] = set()
        self.most_subscriptions = 0
        self.actions: list[str] = []
        self.secrets: dict[str, str] = {}
        self.news = asyncio.Condition()
        self._random = random.Random(7)
        self._num_requests = 0

    def subscribe_live(self) -> FakeSubscription:
        """As ``EngineClient``'s: a new one begins with how things stand."""
        subscription = FakeSubscription(self)
        self.subscriptions.add(subscription)
        self.most_subscriptions = max(self.most_subscriptions, len(self.subscriptions))
        subscription.updates.put_nowait(self.update([]))
        return subscription

    async def control(self, action: ControlAction) -> bool:
        """As ``EngineClient``'s."""
        self.actions.append(action)
        self.paused = action != "resume"
        if action == "step":
            await self.step()
        else:
            self.publish([])
        return self.paused

    def abort_request(self, request_id: str, secret: str) -> bool:
        """End a request, if the secret is its own; those who read it see that after the next step."""
        if self.secrets.get(request_id) != secret:
            return False
        gone = self.simulation.abort(request_id)
        self.publish([])
        return bool(gone)

    def die(self) -> None:
        """What the end of the engine's process looks like."""
        self.is_alive, self.failure = False, "its process ended unexpectedly"
        for subscription in self.subscriptions:
            subscription.updates.put_nowait(None)

    def update(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """An update with these steps and the state of now."""
        simulation = self.simulation
        state = {"time_s": time.monotonic(), "paused": self.paused, "steps": steps, "skipped": 0}
        return state | {"state": simulation.state(), "totals": simulation.totals()}

    def publish(self, steps: list[dict[str, Any]]) -> None:
        """Send an update to all who watch."""
        for subscription in self.subscriptions:
            subscription.updates.put_nowait(self.update(steps))

    async def step(self) -> None:
        """One step, if there is anything to do."""
        if self.traffic and len(self.simulation.waiting) < 6:
            self.add_request()
        step = self.simulation.step()
        if step is not None:
            self.publish([step])
            async with self.news:
                self.news.notify_all()

    def add_request(self) -> None:
        """Another client's request, of a length that varies."""
        self._num_requests += 1
        samples = 3 if self._num_requests % 5 == 0 else 1
        name = f"cmpl-{self._num_requests}"
        self.simulation.add(name, self._random.randint(8, 150), self._random.randint(30, 220), samples)

    async def run(self) -> None:
        """Step for ever."""
        while True:
            if not self.paused:
                await self.step()
            await asyncio.sleep(1 / self.steps_per_s)


def fake_app(client: FakeClient, options: ServerOptions) -> FastAPI:
    """The live view, and as much of the API as its page uses."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(client.run())
        yield
        running.cancel()

    async def check_key(request: Request) -> None:
        open_to_all = request.url.path == "/live" or "." in request.url.path
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if options.api_key and not open_to_all and not secrets.compare_digest(key, options.api_key):
            raise ApiError(401, "the API key is missing or wrong")

    app = FastAPI(lifespan=lifespan, dependencies=[Depends(check_key)])

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        if "refuse" in body["prompt"]:
            raise ApiError(400, "this server refuses that", param="prompt")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        name = f"cmpl-{secrets.token_hex(4)}"
        names = [f"{name}-{index}" for index in range(len(prompts))] if isinstance(body["prompt"], list) else [name]
        secret = request.headers.get(SECRET_HEADER, "")
        client.secrets |= dict.fromkeys(names, secret)
        seqs = [
            seq
            for prompt, one in zip(prompts, names)
            for seq in client.simulation.add(one, 3 + len(prompt) // 3, body["max_tokens"], body["n"])
        ]
        return StreamingResponse(_stream(client, name, names, seqs, secret), media_type="text/event-stream")

    app.include_router(live_router(client, options))
    add_error_handlers(app)
    return app


async def _stream(client: FakeClient, name: str, names: list[str], seqs: list[Seq], secret: str) -> AsyncIterator[str]:
    sent = [0] * len(seqs)
    over: set[int] = set()
    try:
        while len(over) < len(seqs):
            async with client.news:
                await client.news.wait()
            alive = {seq.seq_id for seq in client.simulation.running + client.simulation.waiting}
            for index, seq in enumerate(seqs):
                if index in over:
                    continue
                text = "".join(f" {WORDS[(word + seq.seq_id) % len(WORDS)]}" for word in range(sent[index], seq.words))
                sent[index] = seq.words
                reason = None if seq.seq_id in alive else "length" if seq.num_tokens >= seq.num_wanted else "abort"
                if reason:
                    over.add(index)
                if text or reason:
                    choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
                    yield f"data: {json.dumps({'id': name, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for one in names:
            client.abort_request(one, secret)


@contextlib.contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve an app from a thread; gives its address."""
    config = uvicorn.Config(app, port=port, http=HttpConnection, log_level="warning", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def main() -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description="The live page, with a simulation instead of an engine.")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--num-blocks", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--steps-per-second", type=float, default=20.0)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    client = FakeClient(Simulation(args.num_blocks, max_num_seqs=args.max_num_seqs), args.steps_per_second)
    options = ServerOptions(port=args.port, live_control=True, api_key=args.api_key)
    with serving(fake_app(client, options), args.port) as address:
        print(f"{address}/live")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
