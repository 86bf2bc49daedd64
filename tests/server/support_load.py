"""Two hundred clients of every kind, and what each must get: told before, by the same model without a server."""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.outputs import CompletionOutput
from pagebrain.server.api.logprob_json import TokenTexts

KINDS = ("plain", "scored", "samples", "stops", "whole", "generate")
STOPS = ["the", "e a", "ou"]
STAY = 100
"""Tokens that a client asks for who means to leave: many more than it waits for."""


@dataclass(frozen=True)
class Expected:
    """One sample: its text and its end, and if the client asked for them the names of its tokens, or their ids."""

    text: str
    finish_reason: str
    tokens: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """What one client asks for, and what it must get."""

    kind: str
    path: str
    body: dict[str, Any]
    expected: tuple[Expected, ...]


def make_asks(num_clients: int) -> list[Ask]:
    """As many of each kind."""
    rng = random.Random(5)
    llm = LLM(num_blocks=600, dtype="float64")
    assert llm.engine.detokenizer is not None
    texts = TokenTexts(llm.engine.detokenizer)
    kinds = [KINDS[index % len(KINDS)] for index in range(num_clients)]
    prompts: list[Any] = [[rng.randrange(300, 1500) for _ in range(rng.randint(1, 40))] for _ in kinds]
    params = []
    for index, kind in enumerate(kinds):
        if kind == "generate":
            prompts[index] = f"Once upon a time there were {index} clients who"
            params.append(SamplingParams(temperature=0, max_tokens=rng.randint(4, 16)))
            continue
        params.append(
            SamplingParams(
                temperature=rng.choice([0.0, 0.8]),
                top_p=rng.choice([1.0, 0.9]),
                seed=index,
                max_tokens=rng.randint(4, 16),
                ignore_eos=True,
                n=3 if kind == "samples" else 1,
                stop=STOPS if kind == "stops" else (),
                logprobs=index // len(KINDS) % 2 if kind in ("scored", "whole") else None,
            )
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        Ask(
            kind,
            "/generate" if kind == "generate" else "/v1/completions",
            _body(kind, prompt, asked),
            tuple(_expected(kind, sample, texts) for sample in output.outputs),
        )
        for kind, prompt, asked, output in zip(kinds, prompts, params, outputs)
    ]


def _body(kind: str, prompt: list[int] | str, params: SamplingParams) -> dict[str, Any]:
    if kind == "generate":
        return {"prompt": prompt, "max_new_tokens": params.max_tokens, "method": "greedy"}
    return {
        "prompt": prompt,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
        "ignore_eos": True,
        "n": params.n,
        "stop": list(params.stop) or None,
        "logprobs": params.logprobs,
        "stream": kind != "whole",
    }


def _expected(kind: str, sample: CompletionOutput, texts: TokenTexts) -> Expected:
    assert sample.finish_reason is not None
    if kind == "generate":
        return Expected(sample.text, sample.finish_reason, token_ids=tuple(sample.token_ids))
    if sample.logprobs is None:
        return Expected(sample.text, sample.finish_reason)
    names = tuple(texts.text(token_id) for token_id in sample.token_ids)
    return Expected(sample.text, sample.finish_reason, names, tuple(score.logprob for score in sample.logprobs))


async def one_round(url: str, asks: list[Ask], rng: random.Random) -> tuple[int, int]:
    """All clients at once, a third of whom leave, and the others compare what comes with what was expected.

    Returns the most sequences that were seen under way at a time, and how many clients left before their answer's end.
    """
    leavers = set(rng.sample(range(len(asks)), num_leavers(asks)))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        watching = asyncio.create_task(_watch(session, url))
        came_and_went = (
            _leave(session, url, ask, rng) if index in leavers else _stay(session, url, ask)
            for index, ask in enumerate(asks)
        )
        left = await asyncio.gather(*came_and_went)
        watching.cancel()
        (most,) = await asyncio.gather(watching)
    return most, sum(left)


def num_leavers(asks: list[Ask]) -> int:
    """How many leave in each round."""
    return len(asks) // 3


async def _watch(session: aiohttp.ClientSession, url: str) -> int:
    most = 0
    names = ("pagebrain:num_requests_running{", "pagebrain:num_requests_waiting{")
    try:
        while True:
            async with session.get(url + "/metrics") as response:
                lines = (await response.text()).splitlines()
            most = max(most, sum(int(float(line.split()[-1])) for line in lines if line.startswith(names)))
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return most


async def _leave(session: aiohttp.ClientSession, url: str, ask: Ask, rng: random.Random) -> bool:
    """Ask for a lot and hang up: at once, when the answer has begun, or while it is waited for in one piece.

    False if the answer was over before.
    """
    streams = rng.random() < 0.75
    prompt = ask.body["prompt"]
    body = {"prompt": prompt, "max_tokens": STAY, "ignore_eos": True, "stream": streams, "n": rng.choice([1, 1, 2])}
    if not streams:
        patience = aiohttp.ClientTimeout(rng.uniform(0.03, 0.15))
        try:
            async with session.post(url + "/v1/completions", json=body, timeout=patience):
                return False
        except asyncio.TimeoutError:
            return True
    num_events = rng.randint(0, 4)
    async with session.post(url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        while num_events > 0:
            line = await response.content.readline()
            if line.strip() and b'"finish_reason": null' not in line:
                return False
            num_events -= line.startswith(b"data: ")
        response.close()
    return True


async def _stay(session: aiohttp.ClientSession, url: str, ask: Ask) -> bool:
    async with session.post(url + ask.path, json=ask.body) as response:
        assert response.status == 200, await response.text()
        content = await response.text()
    if ask.kind == "whole":
        pieces = json.loads(content)["choices"]
    else:
        *data, last = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
        assert last == "[DONE]"
        pieces = [piece for event in map(json.loads, data) for piece in event.get("choices", [event])]
    for index, expected in enumerate(ask.expected):
        _compare([piece for piece in pieces if piece.get("index", 0) == index], expected)
    return False


def _compare(pieces: list[dict[str, Any]], expected: Expected) -> None:
    """The pieces of one sample, in order."""
    assert "".join(piece.get("text", "") for piece in pieces) == expected.text
    assert [piece["finish_reason"] for piece in pieces if piece.get("finish_reason")] == [expected.finish_reason]
    if expected.token_ids is not None:
        assert tuple(token_id for piece in pieces for token_id in piece.get("token_ids", [])) == expected.token_ids
    if expected.tokens is not None:
        scores = [piece["logprobs"] for piece in pieces]
        assert tuple(token for score in scores for token in score["tokens"]) == expected.tokens
        got = [logprob for score in scores for logprob in score["token_logprobs"]]
        assert got == pytest.approx(expected.logprobs, abs=1e-9)
