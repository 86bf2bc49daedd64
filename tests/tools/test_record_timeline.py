"""The timeline's recorder, as far as it goes without a GPU: parts of steps, a trace, a picture, and the committed record."""

import json
from typing import Any

import pytest
import torch

from chapters.aids import timeline
from chapters.course.catalog import ROOT
from pagebrain import PageBrainConfig
from tests.support.models import random_gpt2
from tools import record_timeline

RECORD = ROOT / "docs" / "performance" / "timeline.json"


@pytest.fixture(scope="module")
def report() -> Any:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
def test_the_parts_of_a_step_follow_each_other(async_scheduling: bool) -> None:
    config = PageBrainConfig.for_model(random_gpt2(), num_blocks=8, max_num_seqs=2, async_scheduling=async_scheduling)
    engine = timeline.Watched(random_gpt2(), config, keep_history=False)
    engine.add_request([1, 2, 3], 12)
    while engine.step() is not None:
        pass
    steady = engine.parts[3:10]
    for parts in steady:
        assert [name for name, _, _ in parts] == list(timeline.PARTS)
        times = [time for _, start, end in parts for time in (start, end)]
        assert times == sorted(times)


def event(kind: str, name: str, start: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length}


def test_a_trace_is_brought_to_the_hosts_clock_by_its_markers() -> None:
    """The profiler's clock is 5 s behind; microseconds there, seconds here."""
    events = [
        event("cuda_runtime", "cudaLaunchKernel", 100, 50),
        event("kernel", "marker", 160, 2),
        event("cuda_runtime", "cudaLaunchKernel", 200, 4),
        event("kernel", "marker", 206, 2),
        event("cuda_runtime", "cudaGraphLaunch", 300, 20),
        event("kernel", "a", 330, 10),
        event("kernel", "b", 340.5, 10),  # a pause too short to be shown
        event("gpu_memcpy", "Memcpy DtoH", 360, 1),
        event("cuda_runtime", "cudaMemcpyAsync", 321, 3),
        event("cuda_runtime", "cudaEventSynchronize", 325, 40),
        {"ph": "M", "name": "process_name"},
    ]
    noted = [(5.000090, 5.000160), (5.000199, 5.000205)]
    busy, counts = timeline.read_events(events, noted)
    assert [(round(1e6 * (start - 5)), round(1e6 * (end - 5))) for start, end in busy] == [(330, 350), (360, 361)]
    assert counts["kernels"] == 2 and counts["launches"] == 2
    assert counts["clock_error_us"] == pytest.approx(1, abs=0.1)


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="CUPTI"):
        timeline.read_events([event("cuda_runtime", "cudaLaunchKernel", 100, 5)], [(0.0, 1.0)])


def test_the_command_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert record_timeline.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_committed_record_is_what_the_command_writes(report: Any) -> None:
    assert timeline.to_json(report) == RECORD.read_text(encoding="utf-8")
    assert report["command"].startswith("python -m tools.record_timeline")
    assert report["versions"]["gpu"]
    assert [(run["batch"], run["way"]) for run in report["runs"]] == [(n, way) for n in (1, 32) for way in timeline.WAYS]
    assert all(run["same_tokens"] for run in report["runs"])


def test_in_the_committed_record_no_token_is_read_before_the_gpu_has_it(report: Any) -> None:
    """The two clocks were put together rightly: with one graph a step, the GPU is idle when the wait ends."""
    for run in report["runs"]:
        if run["way"] == "graph":
            ends = [end for name, _, end in run["timeline"]["host"] if name == "wait"]
            for end in ends[:-1]:
                overlap = [(start, stop) for start, stop in run["timeline"]["gpu"] if start + 25 < end < stop - 25]
                assert not overlap, (run["batch"], end, overlap)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_picture_says_what_it_shows(report: Any, batch_size: int) -> None:
    picture = timeline.draw(report, batch_size)
    assert len(picture.figure.axes) == 3
    for run in report["runs"]:
        assert (f"{run['step_ms']['median']:.2f} ms a step" in picture.alt) == (run["batch"] == batch_size)
    assert len(timeline.draw(report, batch_size, ["eager"]).figure.axes) == 1
