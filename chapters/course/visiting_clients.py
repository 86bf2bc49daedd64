"""Clients that arrive, stream and depart: what ``try 05`` shows of a learner's ``AsyncEngine``."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import GPT2LMHeadModel

from pagebrain import PageBrainConfig
from pagebrain.engine.trace import StepTrace
from pagebrain.viz import terminal
from pagebrain.viz.state import letter

NEXT_AFTER, LEAVES_AFTER, LEAVER = 3, 4, 1
"""Tokens after which the next client arrives; tokens after which a client leaves early; the number of that client."""

PATIENCE_S = 20.0
"""How long clients may wait while no step ends."""


@dataclass
class Visit:
    """One client. Steps are counts of the steps that had ended at that moment."""

    arrived: int = 0
    first: int = 0
    departed: int = 0
    tokens: list[int] = field(default_factory=list)
    is_early: bool = False


@dataclass
class Visits:
    """What the clients saw, in the order of their arrival, and what they held after they had gone."""

    clients: list[Visit]
    traces: list[StepTrace]
    num_blocks: int
    num_free: int = 0
    num_served: int = 0
    stuck: str = ""

    def problem(self, answers: Sequence[Sequence[int]]) -> str:
        """What is wrong, empty if nothing: clients wait, have other tokens than ``answers``, or hold blocks in the end."""
        if self.stuck:
            return self.stuck
        for number, (client, answer) in enumerate(zip(self.clients, answers)):
            wanted = list(answer[: len(client.tokens)] if client.is_early else answer)
            if client.tokens != wanted:
                return f"Client {letter(number)} streamed the tokens {client.tokens}, expected {wanted}."
        if self.num_free != self.num_blocks or self.num_served:
            held = f"{self.num_blocks - self.num_free} of {self.num_blocks} blocks"
            return f"All clients have gone, but {held} are not free, and clients holds {self.num_served}."
        return ""

    def shown(self) -> Group:
        """A table of the clients, and a line of steps for each."""
        table = Table(box=None, pad_edge=False)
        for title in ("Client", "arrives at step", "first token", "departs", "tokens read", "its steps", ""):
            table.add_column(title, justify="left" if title in ("Client", "") else "right")
        for number, client in enumerate(self.clients):
            steps = sum(row.seq_id == number for trace in self.traces for row in trace.rows)
            end = "leaves early" if client.is_early else "reads all"
            times = (client.arrived, client.first, client.departed, len(client.tokens), steps)
            table.add_row(Text(letter(number), style=f"bold {terminal.colour(number)}"), *map(str, times), end)
        after = f"{self.num_free} of {self.num_blocks} blocks are free in the end."
        heading = Text("Your AsyncEngine, with clients that come one after the other", style="bold")
        return Group(heading, table, Text(), terminal.timeline(self.traces), Text(after))


def serve_visits(
    module: ModuleType, model: GPT2LMHeadModel, prompts: Sequence[list[int]], max_new_tokens: int, **settings: Any
) -> Visits:
    """Serve a client for each prompt with ``module.AsyncEngine``; ``settings`` are those of the engine's config.

    Each client after the first arrives when the one before has some tokens, and one closes its stream early. Raises what
    ends the learner's loop.
    """
    visits = Visits([Visit() for _ in prompts], [], settings["num_blocks"])
    config = PageBrainConfig.for_model(model, **settings)
    shared = module.AsyncEngine(module.Engine(model, config, on_step=visits.traces.append))
    asyncio.run(_serve(shared, visits, prompts, max_new_tokens))
    return visits


async def _serve(shared: Any, visits: Visits, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    come = [asyncio.Event() for _ in prompts]
    come[0].set()

    async def visit(number: int) -> None:
        await come[number].wait()
        client, behind = visits.clients[number], come[number + 1 :][:1]
        client.arrived = len(visits.traces)
        async with aclosing(shared.stream(prompts[number], max_new_tokens)) as tokens:
            async for token_id in tokens:
                client.first = client.first or len(visits.traces)
                client.tokens.append(token_id)
                if len(client.tokens) == NEXT_AFTER:
                    _set(behind)
                if number == LEAVER and len(client.tokens) == LEAVES_AFTER < max_new_tokens:
                    client.is_early = True
                    break
        client.departed = len(visits.traces)
        _set(behind)

    async def all_visits() -> None:
        await asyncio.gather(*map(visit, range(len(prompts))))
        while shared.departed:
            await asyncio.sleep(0.001)

    loop, clients = asyncio.create_task(shared.run()), asyncio.create_task(all_visits())
    try:
        num_steps = -1
        while not loop.done() and not clients.done() and len(visits.traces) > num_steps:
            num_steps = len(visits.traces)
            await asyncio.wait({loop, clients}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if loop.done():
            loop.result()
            visits.stuck = "AsyncEngine.run returned, and it must go on until it is cancelled."
        elif not clients.done():
            visits.stuck = f"No step has ended for {PATIENCE_S:g} s, and clients still wait: python -m chapters check 05."
        else:
            clients.result()
    finally:
        clients.cancel()
        loop.cancel()
        await asyncio.wait({loop, clients}, timeout=1)
    visits.num_free, visits.num_served = shared.engine.cache.num_free_blocks, len(shared.clients)


def _set(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()
