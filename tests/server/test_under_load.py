"""Two hundred clients at once on a pool that is far too small, a third of whom hang up: nothing is lost, nothing is left."""

import asyncio
import json
import random
import time
from dataclasses import dataclass

import aiohttp
import psutil
import pytest
import uvicorn

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.server.app import create_app
from pagebrain.server.client import EngineClient
from pagebrain.server.options import ServerOptions
from pagebrain.server.run import listen, url_of
from tests.support.event_loop import LoopThread
from tests.support.served import Served

NUM_CLIENTS = 200
NUM_ROUNDS = 10
SETTLED_AFTER = 4
"""Rounds after which buffers and caches have the size that they keep."""

ENGINE = {"num_blocks": 24, "block_size": 8, "max_num_seqs": 12, "max_num_batched_tokens": 32, "dtype": "float64"}
MAX_GROWTH_BYTES = 6 * 2**20


@dataclass(frozen=True)
class Ask:
    """What one client asks for, and what it must get."""

    prompt: list[int]
    params: SamplingParams
    expected: str

    @property
    def body(self) -> dict[str, object]:
        params = self.params
        return {
            "prompt": self.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "ignore_eos": True,
            "stream": True,
        }


def make_asks() -> list[Ask]:
    rng = random.Random(5)
    prompts = [[rng.randrange(300, 1500) for _ in range(rng.randint(1, 40))] for _ in range(NUM_CLIENTS)]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.8]),
            top_p=rng.choice([1.0, 0.9]),
            seed=seed,
            max_tokens=rng.randint(5, 40),
            ignore_eos=True,
        )
        for seed in range(NUM_CLIENTS)
    ]
    outputs = LLM(num_blocks=600, dtype="float64").generate(prompts, params, use_tqdm=False)
    return [Ask(prompt, asked, output.outputs[0].text) for prompt, asked, output in zip(prompts, params, outputs)]


async def stream(session: aiohttp.ClientSession, url: str, ask: Ask, hang_up_after: int | None) -> str | None:
    """The text of a stream; ``None`` if the client hung up after so many events."""
    text = ""
    async with session.post(url + "/v1/completions", json=ask.body) as response:
        assert response.status == 200, await response.text()
        num_events = 0
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            num_events += 1
            if num_events == hang_up_after:
                response.close()
                return None
    return text


async def one_round(url: str, asks: list[Ask], rng: random.Random) -> int:
    """All clients at once; returns how many streams came to their end, each with its offline text."""
    leavers = set(rng.sample(range(len(asks)), len(asks) // 3))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        texts = await asyncio.gather(
            *(stream(session, url, ask, rng.randint(1, 4) if index in leavers else None) for index, ask in enumerate(asks))
        )
    for ask, text in zip(asks, texts):
        assert text in (None, ask.expected)
    return sum(text is not None for text in texts)


def resident_bytes(served: Served) -> dict[str, int]:
    return {
        "server": psutil.Process(served.process.pid).memory_info().rss,
        "engine": served.engine.memory_info().rss,
    }


@pytest.mark.timeout(300)
def test_ten_rounds_of_clients_who_come_and_go_leave_nothing_behind() -> None:
    asks = make_asks()
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    rng = random.Random(9)
    with Served(*settings) as served:
        server = psutil.Process(served.process.pid)
        sizes: list[dict[str, int]] = []
        num_files = 0
        for number in range(NUM_ROUNDS):
            survivors = asyncio.run(one_round(served.url, asks, rng))
            assert survivors >= NUM_CLIENTS - NUM_CLIENTS // 3
            served.wait_until(served.is_idle, "something was left in the engine")
            sizes.append(resident_bytes(served))
            if number == SETTLED_AFTER:
                num_files = server.num_fds()
        assert served.metric("num_preemptions_total") > NUM_ROUNDS
        assert server.num_fds() <= num_files + 2  # no connection stayed open
        for name in ("server", "engine"):
            growth = sizes[-1][name] - sizes[SETTLED_AFTER][name]
            assert growth < MAX_GROWTH_BYTES, (name, sizes)
        assert served.get("/health").status_code == 200
        assert not [line for line in served.lines if "rror" in line or "Traceback" in line]


def test_no_task_of_a_request_outlives_it() -> None:
    asks = make_asks()[:60]
    options = ServerOptions()
    with LoopThread() as loop:
        client = EngineClient(PageBrainConfig(**ENGINE), options)  # type: ignore[arg-type]
        loop.run(client.start())
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(create_app(client, options), log_config=None, lifespan="off"))
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), loop.loop)

        async def num_tasks() -> int:
            return len(asyncio.all_tasks())

        try:
            url = url_of(listener)
            asyncio.run(one_round(url, asks, random.Random(1)))  # what is made once is made
            before = loop.run(num_tasks())
            for number in range(2):
                asyncio.run(one_round(url, asks, random.Random(number)))
            until = time.monotonic() + 10
            while loop.run(num_tasks()) > before and time.monotonic() < until:
                time.sleep(0.05)
            assert loop.run(num_tasks()) == before
            assert client.num_streams == 0 and client.admission.num_requests == 0
        finally:
            server.should_exit = True
            serving.result(30)
            loop.run(client.stop())
            listener.close()
