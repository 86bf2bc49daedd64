"""The server without a second process: an engine that steps on the event loop, behind uvicorn in a thread.

Quick to start, so that tests of the HTTP API need not wait for processes. Everything between HTTP and the pipe is the real
code; the engine is reached through an :class:`InProcessHandle` instead of a process.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import uvicorn

from pagebrain import LLM
from pagebrain.engine.trace import EngineStats
from pagebrain.outputs import OutputDelta
from pagebrain.server.api.app import create_app
from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.link.client import EngineClient
from pagebrain.server.link.handle import EngineListener
from pagebrain.server.link.messages import ControlAction, Submit, pack_delta
from pagebrain.server.options import ServerOptions

SETTINGS: dict[str, Any] = {"dtype": "float64", "num_blocks": 256, "max_num_seqs": 16, "max_num_batched_tokens": 256}


class InProcessHandle:
    """An :class:`~pagebrain.server.link.handle.EngineHandle` to an engine that steps on the event loop.

    Attributes:
        engine: may be looked at from the event loop's thread only.
        step_s: how long to wait between two steps.
        unread: what :meth:`poll` tells the listener.
    """

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.config = llm.config
        self.notices: tuple[str, ...] = ()
        self.stats = EngineStats()
        self.paused = False
        self.heard_s = time.monotonic()
        self.pid = None
        self.step_s = 0.0
        self.unread: list[list[OutputDelta]] = []

    async def start(self, listener: EngineListener) -> None:
        """Begin to step."""
        self._listener = listener
        self._news = asyncio.Event()
        self._stepping = asyncio.create_task(self._step())

    async def stop(self) -> None:
        """Stop stepping."""
        self._stepping.cancel()
        await asyncio.gather(self._stepping, return_exceptions=True)

    def submit(self, request: Submit) -> None:
        """Add a request to the engine."""
        self.engine.add_request(request.prompt_token_ids, request.params_for_engine, request.request_id)
        self._news.set()

    def abort(self, request_id: str) -> None:
        """End a request."""
        self.engine.abort(request_id)
        self._listener.on_ended(request_id)

    def watch(self, on: bool) -> None:
        """There is no live view here."""

    def control(self, action: ControlAction) -> "asyncio.Future[bool]":
        """It cannot be paused."""
        done = asyncio.get_running_loop().create_future()
        done.set_result(False)
        return done

    def poll(self) -> None:
        """Tell what is unread."""
        while self.unread:
            self._tell(self.unread.pop(0))

    def die(self, reason: str) -> None:
        """As if the engine's process had ended."""
        self._stepping.cancel()
        self._listener.on_dead(reason)

    def step(self) -> list[OutputDelta]:
        """Compute a step; its deltas, as they come out of a pipe."""
        return [OutputDelta._make(pack_delta(delta)) for delta in self.engine.step()]

    def _tell(self, deltas: list[OutputDelta]) -> None:
        self.stats, self.heard_s = self.engine.stats(), time.monotonic()
        self._listener.on_step(deltas, self.stats)

    async def _step(self) -> None:
        while True:
            self._news.clear()
            while self.engine.has_unfinished_requests:
                try:
                    self._tell(self.step())
                except Exception as error:  # otherwise every request would wait for its timeout
                    self._listener.on_dead(repr(error))
                    raise
                await asyncio.sleep(self.step_s)
            await self._news.wait()


class InProcessClient(EngineClient):
    """The client of an engine in this process. ``engine`` may be looked at from the event loop's thread only."""

    handle: InProcessHandle

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        super().__init__(InProcessHandle(llm), options)
        self.engine = llm.engine
        self.tokenizer = llm.tokenizer
        self.detokenizer = llm.engine.detokenizer

    async def start(self) -> None:
        """Begin to step; text is there already."""
        await self.handle.start(self)


class ServerThread:
    """A server on a free port. Use as a context.

    Attributes:
        client: the engine's; belongs to the server's thread, see :meth:`call`.
        url: where it listens.
    """

    def __init__(self, llm: LLM | None = None, **options: Any) -> None:
        self._llm = LLM(**SETTINGS) if llm is None else llm
        self._options = ServerOptions(**options)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.client = InProcessClient(self._llm, self._options)
        await self.client.start()
        app = create_app(self.client, self._options)
        config = uvicorn.Config(
            app, port=0, http=HttpConnection, lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self._started.set()
        await serving
        await self.client.stop()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call on the server's event loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def wait_until_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until no request is under way and every block is free again."""
        client, until = self.client, time.monotonic() + timeout_s
        while not self.call(lambda: client.num_streams == 0 and not client.engine.has_unfinished_requests):
            assert time.monotonic() < until, "requests are still under way"
            time.sleep(0.01)
        assert self.call(lambda: client.engine.cache_manager.num_free_blocks) == client.config.num_blocks

    def post(self, path: str, body: Any = None, **settings: Any) -> httpx.Response:
        """POST a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, **settings)

    def get(self, path: str) -> httpx.Response:
        """GET a path."""
        return httpx.get(self.url + path, timeout=60)

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        assert self._started.wait(60), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
