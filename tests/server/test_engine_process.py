"""The engine in a process of its own: the same tokens, the same refusals, and a clear end when it dies."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.engine.trace import EngineStats
from pagebrain.errors import ConfigError, InvalidRequestError, ModelLoadError, PageBrainError
from pagebrain.server.link import streams
from pagebrain.server.link.admission import QueueFullError
from pagebrain.server.link.client import EngineClient
from pagebrain.server.link.handle import EngineDeadError
from pagebrain.server.link.process import EngineProcess
from pagebrain.server.link.streams import DrainingError, RequestStream, SlowReaderError
from pagebrain.server.options import ServerOptions
from tests.support.event_loop import LoopThread

SETTINGS = {"num_blocks": 12, "block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 16, "dtype": "float64"}
PROMPT = "Once upon a time"
FAILING_STEP = """
from pagebrain.engine.scheduler import Scheduler


class Failing(Scheduler):
    def schedule(self):
        if any(len(seq.token_ids) > 8 for seq in self.running):
            raise RuntimeError("no more")
        return super().schedule()
"""


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.stats: list[EngineStats] = []
        self.first: list[str] = []
        self.tokens = 0
        self.gaps = 0
        self.finished: list[tuple[str, str]] = []

    def on_step(self, stats: EngineStats) -> None:
        self.stats.append(stats)

    def on_first_token(self, request: RequestStream, seconds: float) -> None:
        assert seconds > 0
        self.first.append(request.request_id)

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        self.tokens += num_tokens
        self.gaps += len(gaps_s)

    def on_finished(self, request: RequestStream, outcome: str) -> None:
        self.finished.append((request.request_id, outcome))


class Engine:
    """A started client with its loop."""

    def __init__(self, loop: LoopThread, client: EngineClient) -> None:
        self.loop = loop
        self.client = client
        self.run = loop.run

    async def generate(self, params: SamplingParams, name: str, prompt: str = PROMPT) -> list[list[int]]:
        stream = self.client.submit(self.client.check(prompt, params), params, name)
        try:
            return [list(delta.token_ids) for delta in await stream.read_all()]
        finally:
            stream.close()

    async def idle(self) -> EngineStats:
        """How the engine stands once nothing is left in it."""
        for _ in range(500):
            stats = self.client.stats
            if not (stats.num_running or stats.num_waiting) and stats.num_free_blocks == stats.num_blocks:
                return stats
            await asyncio.sleep(0.01)
        raise AssertionError(f"the engine did not become idle: {self.client.stats}")


def start(loop: LoopThread, options: ServerOptions | None = None, **settings: object) -> Engine:
    client = EngineClient(EngineProcess(PageBrainConfig(**(SETTINGS | settings))), options or ServerOptions())  # type: ignore[arg-type]
    loop.run(client.start())
    return Engine(loop, client)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with LoopThread() as loop:
        started = start(loop)
        yield started
        loop.run(started.client.stop())


@pytest.fixture
def doomed() -> Iterator[Engine]:
    """An engine that a test may kill."""
    with LoopThread() as loop:
        started = start(loop)
        yield started
        loop.run(started.client.stop())


def test_tokens_are_those_of_llm_generate_under_preemption(engine: Engine) -> None:
    asked = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=40, ignore_eos=True, n=n)
        for seed, (temperature, n) in enumerate([(0.0, 1), (0.9, 1), (1.2, 2), (0.7, 3), (0.0, 1)])
    ]
    expected = LLM(num_blocks=200, dtype="float64").generate([PROMPT] * len(asked), asked, use_tqdm=False)

    async def all_at_once() -> list[list[list[int]]]:
        return await asyncio.gather(*(engine.generate(params, f"r{i}") for i, params in enumerate(asked)))

    before = engine.client.stats.num_preemptions
    got = engine.run(all_at_once())
    assert got == [[list(sample.token_ids) for sample in output.outputs] for output in expected]
    assert engine.run(engine.idle()).num_preemptions > before


def test_observers_hear_of_every_token_and_every_end(engine: Engine) -> None:
    recorder = Recorder()
    engine.client.observers.append(recorder)

    async def scenario() -> None:
        await engine.generate(SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=0), "a")
        stream = engine.client.submit([50, 60], SamplingParams(ignore_eos=True), "b")
        await stream.read()
        stream.close()
        await engine.idle()

    engine.run(scenario())
    engine.client.observers.remove(recorder)
    assert recorder.first == ["a", "b"]
    assert recorder.finished == [("a", "length"), ("b", "abort")]
    assert recorder.tokens >= 13 and recorder.gaps >= 10
    computed = sum(count for stats in recorder.stats for count in stats.last_step_tokens)
    assert computed >= 5 + 1 + 2 * 5  # the prompt once, its last token again for the second sample, and decodes


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_an_engine_that_stands_still_with_requests_under_way_is_silent(engine: Engine) -> None:
    client, pid = engine.client, engine.client.engine_pid
    assert pid is not None

    async def scenario() -> None:
        await asyncio.sleep(0.3)
        assert client.silent_s == 0, "it has nothing to say"
        stream = client.submit([50, 60], SamplingParams(ignore_eos=True), "frozen")
        assert client.silent_s < 0.2
        await stream.read()
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.5)
            assert client.silent_s > 0.3
            stream.close()
            assert client.silent_s > 0.3, "it has not let the request go yet"
            client.submit([50, 60], SamplingParams(max_tokens=1), "another").close()
            assert client.silent_s > 0.3, "another request is no sign of life"
        finally:
            os.kill(pid, signal.SIGCONT)
        await engine.idle()
        await asyncio.sleep(0.2)
        assert client.silent_s == 0

    engine.run(scenario())


def test_prompt_logprobs_come_with_the_first_delta(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, logprobs=1)
    (expected,) = LLM(num_blocks=50, dtype="float64").generate(PROMPT, params, use_tqdm=False)

    async def scenario() -> None:
        stream = engine.client.submit(engine.client.check(PROMPT, params), params, "scores")
        (delta,) = await stream.read()
        assert delta.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert delta.prompt_logprobs[0] is expected.prompt_logprobs[0] is None
        assert expected.outputs[0].logprobs is not None
        got = [*delta.prompt_logprobs[1:], *delta.logprobs]
        for mine, theirs in zip(got, [*expected.prompt_logprobs[1:], *expected.outputs[0].logprobs]):
            assert mine is not None and theirs is not None
            assert (mine.token_id, mine.rank) == (theirs.token_id, theirs.rank)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-9)
        assert len(got) >= len(expected.prompt_logprobs)
        stream.close()

    engine.run(scenario())


def test_closing_a_stream_gives_its_blocks_back(engine: Engine) -> None:
    async def scenario() -> None:
        params = SamplingParams(ignore_eos=True, n=2)
        stream = engine.client.submit(engine.client.check(PROMPT, params), params, "leaver")
        while stream.num_generated < 10:
            await stream.read()
        assert engine.client.stats.num_free_blocks < 12
        stream.close()
        stream.close()
        await engine.idle()
        assert engine.client.num_streams == 0

    engine.run(scenario())


def test_bad_requests_are_refused_before_anything_changes(engine: Engine) -> None:
    async def scenario() -> None:
        good = ([50, 60], SamplingParams(max_tokens=1), "good")
        for bad, message in [
            (([], SamplingParams(), "x"), "empty"),
            (([10**9], SamplingParams(), "x"), "ids run from"),
            (([5] * 96, SamplingParams(), "x"), "shorten it"),
            (([5], SamplingParams(stop_token_ids=[10**9]), "x"), "vocabulary"),
            (([5], SamplingParams(), "good"), "differ from each other"),
        ]:
            with pytest.raises(InvalidRequestError, match=message):
                engine.client.submit_all([good, bad])
        assert engine.client.num_streams == 0 and engine.client.admission.num_requests == 0

    engine.run(scenario())


def test_pause_stops_between_steps_and_step_computes_exactly_one(engine: Engine) -> None:
    async def scenario() -> None:
        assert await engine.client.control("pause")
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
        stream = engine.client.submit(engine.client.check(PROMPT, params), params, "held")
        for expected in (0, 1, 2):
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert stream.num_generated == expected
            assert await engine.client.control("step")
        assert not await engine.client.control("resume")
        assert sum(len(delta.token_ids) for delta in await stream.read_all()) == 8

    engine.run(scenario())


def test_live_updates_come_only_while_somebody_watches(engine: Engine) -> None:
    async def scenario() -> None:
        first = engine.client.subscribe_live()
        seen = [await first.__aiter__().__anext__()]
        assert seen[0]["state"]["free_blocks"] == 12  # how things stand, though no step was computed
        await engine.generate(SamplingParams(max_tokens=5, ignore_eos=True, temperature=0), "watched")
        steps: list[int] = []
        while len(steps) < 5:
            update = await first.__aiter__().__anext__()
            steps.extend(step["step"] for step in update["steps"])
        assert steps == list(range(steps[0], steps[0] + 5))
        first.close()
        await engine.generate(SamplingParams(max_tokens=5, ignore_eos=True, temperature=0), "unwatched")
        await asyncio.sleep(0.2)
        assert first._update is None
        second = engine.client.subscribe_live()
        update = await second.__aiter__().__anext__()
        assert update["steps"] == []  # steps are not kept while no viewer is there
        second.close()

    engine.run(scenario())


def test_a_full_queue_refuses_and_keeps_what_it_has_and_a_drain_finishes_that_and_takes_nothing_new() -> None:
    with LoopThread() as loop:
        engine = start(loop, ServerOptions(max_queued_requests=2))

        async def scenario() -> None:
            await engine.client.control("pause")
            params = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0)
            streams = [engine.client.submit([50, 60], params, name) for name in "ab"]
            with pytest.raises(QueueFullError) as caught:
                engine.client.submit([50, 60], params, "c")
            assert caught.value.retry_after_s >= 1
            await engine.client.control("resume")
            for stream in streams:
                assert len((await stream.read_all())[0].token_ids) == 10
            await engine.client.control("pause")
            stream = engine.client.submit([50, 60], params, "d")
            engine.client.begin_drain()
            with pytest.raises(DrainingError):
                engine.client.submit([50, 60], params, "e")
            assert len((await stream.read_all())[0].token_ids) == 10

        loop.run(scenario())
        loop.run(engine.client.stop())


def test_nobody_who_reads_is_held_up_by_one_who_does_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PENDING_TOKENS", 100)
    client = engine.client

    async def step() -> None:
        num_steps = client.stats.num_steps
        await client.control("step")
        while client.stats.num_steps == num_steps:
            await asyncio.sleep(0.001)

    async def scenario() -> None:
        await client.control("pause")
        lazy = client.submit([50, 60], SamplingParams(ignore_eos=True, n=2, max_tokens=80), "lazy")
        while lazy.num_generated < 40:
            await step()
        quick = client.submit([50, 60], SamplingParams(ignore_eos=True, max_tokens=5), "quick")
        reading = asyncio.ensure_future(quick.read_all())
        num_steps = client.stats.num_steps
        while not quick.is_finished:
            await step()
        assert client.stats.num_steps <= num_steps + 8  # its turn came at once: there are seats and blocks for all three
        assert len((await reading)[0].token_ids) == 5
        assert not lazy.is_finished and not lazy.is_broken and lazy.num_generated < 100
        await client.control("resume")
        stats = await engine.idle()
        assert lazy.is_broken and 100 < lazy.num_generated < 160, stats
        with pytest.raises(SlowReaderError):
            await lazy.read_all()

    engine.run(scenario())


def test_aborting_all_ends_every_stream_with_that_reason(engine: Engine) -> None:
    async def scenario() -> None:
        stream = engine.client.submit([50, 60], SamplingParams(ignore_eos=True), "a")
        await stream.read()
        engine.client.abort_all()
        assert (await stream.read_all())[-1].finish_reason == "abort"
        await engine.idle()

    engine.run(scenario())


def test_when_the_engine_is_killed_everybody_is_told_at_once(doomed: Engine) -> None:
    told: list[bool] = []
    doomed.client.on_failure = lambda: told.append(True)

    async def scenario() -> None:
        streams = [doomed.client.submit([50, 60], SamplingParams(ignore_eos=True), f"r{i}") for i in range(6)]
        watching = doomed.client.subscribe_live()
        await streams[0].read()
        assert doomed.client.engine_pid is not None
        os.kill(doomed.client.engine_pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await stream.read_all()
        async for _ in watching:
            pass  # it ends
        assert not doomed.client.is_alive and doomed.client.num_streams == 0
        with pytest.raises(EngineDeadError):
            doomed.client.submit([50, 60], SamplingParams(), "late")
        with pytest.raises(EngineDeadError):
            await doomed.client.control("pause")

    doomed.run(scenario())
    assert told == [True]


def test_a_step_that_keeps_failing_ends_the_engine_with_its_reason(tmp_path: Path) -> None:
    part = tmp_path / "failing.py"
    part.write_text(FAILING_STEP)
    with LoopThread() as loop:
        engine = start(loop, parts={"scheduler": f"{part}:Failing"})

        async def scenario() -> None:
            stream = engine.client.submit([50, 60], SamplingParams(ignore_eos=True), "a")
            with pytest.raises(EngineDeadError, match=r"RuntimeError \(failing.py:8, in schedule\)"):
                await stream.read_all()
            assert engine.client.failure is not None and "no more" not in engine.client.failure

        loop.run(scenario())
        loop.run(engine.client.stop())


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"num_blocks": 1, "max_model_len": 64}, ConfigError, "num_blocks=1"),
        ({"model": "./no/such/folder"}, ModelLoadError, "there is no model folder ./no/such/folder"),
    ],
)
def test_what_cannot_be_built_raises_what_building_raised(
    settings: dict[str, object], kind: type[PageBrainError], message: str
) -> None:
    with LoopThread() as loop, pytest.raises(kind, match=message):
        start(loop, None, **settings)
