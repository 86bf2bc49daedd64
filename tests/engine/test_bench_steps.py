"""The closer look of ``pagebrain bench offline``: arrivals, the memory roof, where the time of a step goes. No timings."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

import pagebrain
from pagebrain import LLM
from pagebrain.bench import decode_steps, engine_loop
from pagebrain.bench.decode_steps import (
    ModelBytes,
    decode_roof,
    decode_window,
    look_back,
    look_closer,
    measure_copy,
    print_closer,
    roof_line,
    step_parts,
)
from pagebrain.bench.engine_loop import StepRecord, run_loop
from pagebrain.bench.gpu_times import OTHER, GpuTimes, Recorder, category_of, read_trace
from pagebrain.bench.serve.load import Load
from pagebrain.bench.workload import GREEDY, BenchRequest, LengthRange, Sampling, make_workload
from pagebrain.engine.trace import StepTotals

VOCAB_SIZE = 97
MODEL = {"load_format": "dummy", "dtype": "float64", "device": "cpu", "seed": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llm(model_folder: str) -> LLM:
    return LLM(model_folder, load_format="dummy", dtype="float64", device="cpu", max_num_batched_tokens=16, max_num_seqs=16)


def requests(count: int = 6) -> list[BenchRequest]:
    return make_workload(count, LengthRange(3, 20), LengthRange(2, 12), VOCAB_SIZE, 3)


def step(
    seconds: float = 1.0, num_decodes: int = 1, context_tokens: int = 10, only_decodes: bool = True, **totals: Any
) -> StepRecord:
    return StepRecord(seconds, StepTotals(num_steps=1, **totals), num_decodes, context_tokens, only_decodes)


def printed(closer: dict[str, Any]) -> str:
    console = Console(record=True, width=140, file=open("/dev/null", "w"))
    print_closer(closer, console)
    return console.export_text()


# Sampling -------------------------------------------------------------------------------------------------------------


def test_a_sampled_requests_seed_is_its_number_and_a_greedy_one_has_none() -> None:
    made = Sampling(0.8, 0.95, 7).params(requests(3))
    assert [(params.temperature, params.top_p, params.top_k, params.seed) for params in made] == [
        (0.8, 0.95, 7, seed) for seed in range(3)
    ]
    assert [params.max_tokens for params in made] == [request.output_len for request in requests(3)]
    assert all(params.ignore_eos for params in made)
    assert {params.seed for params in GREEDY.params(requests(3))} == {None}
    assert str(Sampling(0.8, 0.95)).startswith("temperature 0.8, top-p 0.95; ") and str(GREEDY).startswith("greedy")


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.3, 0.9)], ids=["greedy", "sampled"])
def test_the_loop_gives_the_tokens_of_the_front_door(llm: LLM, sampling: Sampling) -> None:
    params = sampling.params(requests())
    outputs = llm.generate([list(request.prompt_token_ids) for request in requests()], params, use_tqdm=False)
    run = run_loop(llm.engine, requests(), params)
    assert run.token_ids == [list(output.outputs[0].token_ids) for output in outputs]
    assert len({tuple(tokens) for tokens in run.token_ids}) > 1


def test_every_decode_row_is_counted_with_what_it_attended_to(llm: LLM) -> None:
    run = run_loop(llm.engine, requests(), GREEDY.params(requests()))
    contexts = [len(request.prompt_token_ids) + number for request in requests() for number in range(1, request.output_len)]
    assert sum(step.num_decodes for step in run.steps) == len(contexts)
    assert sum(step.context_tokens for step in run.steps) == sum(contexts)
    assert run.totals.num_steps == len(run.steps) == sum(step.totals.num_steps for step in run.steps)
    with_prefill = [step for step in run.steps if step.totals.num_prefill_tokens]
    assert len(with_prefill) > 1 and not any(step.only_decodes for step in with_prefill)  # prompts came in chunks
    assert any(step.only_decodes for step in run.steps)


def test_the_hosts_parts_are_within_the_steps_time(llm: LLM) -> None:
    run = run_loop(llm.engine, requests(), GREEDY.params(requests()))
    totals = run.totals
    parts = [totals.schedule_s, totals.launch_s, totals.wait_s, totals.output_s]
    assert min(parts) > 0 and sum(parts) <= sum(step.seconds for step in run.steps)


class FakeTime:
    """A clock on which every look takes a hundredth of a second, and sleeping takes as long as it says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.01
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_request_is_added_when_its_time_has_come_and_not_before(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, added = FakeTime(), []
    add_request = llm.engine.add_request

    def note_and_add(*args: Any) -> Any:
        added.append(clock.now)
        return add_request(*args)

    monkeypatch.setattr(engine_loop, "time", clock)
    monkeypatch.setattr(llm.engine, "add_request", note_and_add)
    arrivals = [0.0, 0.05, 0.06, 40.0, 40.02, 99.0]  # the others are long done when the last two gaps end
    run = run_loop(llm.engine, requests(), GREEDY.params(requests()), arrivals)
    assert len(added) == 6 and all(0 <= at - 0.01 - arrival < 0.1 for at, arrival in zip(added, arrivals))
    assert all(0 < first < 1 for first in run.first_token_s)  # since the arrival, not since the start
    assert run.token_ids == run_loop(llm.engine, requests(), GREEDY.params(requests())).token_ids


def test_poisson_arrivals_are_the_same_for_the_same_seed() -> None:
    arrivals = Load(rate=50.0).arrivals_s(400, 7)
    assert arrivals is not None and arrivals == Load(rate=50.0).arrivals_s(400, 7) != Load(rate=50.0).arrivals_s(400, 8)
    times = list(arrivals.values())
    assert times == sorted(times) and times[0] == 0 and times[-1] == pytest.approx(400 / 50, rel=0.2)


# The roof -------------------------------------------------------------------------------------------------------------


def test_the_roof_of_gpt2_is_the_one_that_the_design_names() -> None:
    """36,864 bytes a token and 248 MB of weights; 256 sequences of 512 tokens take 1.19 ms at 4.26 TB/s."""
    moves = ModelBytes.of(GPT2Config(), itemsize=2)
    assert (moves.kv_token, moves.weights) == (36_864, 2 * 124_439_808)
    assert moves.of_steps(1, 256 * 512) / 4.26e12 == pytest.approx(1.19e-3, rel=0.01)


def test_the_share_of_the_roof_is_that_of_steps_without_prefill() -> None:
    moves = ModelBytes(weights=1000, kv_token=10)
    steps = [step(9.0, 4, 400, only_decodes=False), step(2.0, 3, 60), step(3.0, 2, 40)]
    found = decode_roof(steps, moves, copy_bytes_per_s=1500.0)
    assert found is not None
    assert (found["num_steps"], found["num_seqs_mean"], found["context_tokens_mean"]) == (2, 2.5, 20)
    assert found["bytes"] == 2 * 1000 + 100 * 10
    assert found["share"] == pytest.approx(3000 / 5.0 / 1500.0)
    assert "40% of what a copy reaches" in roof_line(found)


def test_without_a_copy_there_is_no_share_and_without_decodes_no_roof() -> None:
    moves = ModelBytes(1000, 10)
    found = decode_roof([step()], moves, None)
    assert found is not None and "share" not in found and "no room to measure" in roof_line(found)
    assert decode_roof([step(only_decodes=False)], moves, 1.0) is None
    assert "no step was without prefill" in roof_line(None)


def test_a_copy_is_measured_in_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def half_a_second(copy: Callable[[], torch.Tensor]) -> float:
        copied.append(copy().nbytes)
        return 0.5

    monkeypatch.setattr(decode_steps, "_CPU_COPY_BYTES", 4096)
    monkeypatch.setattr(decode_steps, "cpu_seconds", half_a_second)
    assert measure_copy("cpu") == 2 * 4096 / 0.5
    assert set(copied) == {4096}


# The parts of a step --------------------------------------------------------------------------------------------------


def test_the_window_is_the_beginning_of_the_longest_stretch_without_prefill() -> None:
    def steps(text: str) -> list[StepRecord]:
        return [step(only_decodes=letter == "d") for letter in text]

    assert decode_window(steps("ppdddpdddddpd")) == range(6, 11)
    assert decode_window(steps("ppp")) == range(0)
    assert decode_window(steps("p" + "d" * 100)) == range(1, 65)


HOST: dict[str, Any] = {"schedule_s": 0.1, "launch_s": 0.3, "wait_s": 0.4, "output_s": 0.15}


def test_the_parts_of_a_step_on_a_cpu_add_up_to_it() -> None:
    parts = step_parts([step(1.0, **HOST), step(1.0, **HOST)], None, on_gpu=False)
    assert parts["host"] == pytest.approx(
        {"schedule": 0.1, "prepare": 0.3, "compute": 0.4, "detokenize": 0.15, "rest": 0.05}
    )
    assert parts["gpu"] is None and parts["seconds"] == 1.0


def test_the_parts_of_a_step_on_a_gpu_add_up_on_both_sides() -> None:
    gpu = GpuTimes(busy_s=1.2, launch_s=0.2, num_kernels=80, num_launches=6)
    gpu.by_category |= {"attention": 0.9, "sampling": 0.3}
    parts = step_parts([step(1.0, **HOST), step(1.0, **HOST)], gpu, on_gpu=True)
    assert parts["host"] == pytest.approx(
        {"schedule": 0.1, "prepare": 0.2, "launch": 0.1, "wait for the GPU": 0.4, "detokenize": 0.15, "rest": 0.05}
    )
    assert parts["gpu"]["attention"] == pytest.approx(0.45) and parts["gpu"]["idle"] == pytest.approx(0.4)
    assert sum(parts["host"].values()) == pytest.approx(1.0) == pytest.approx(sum(parts["gpu"].values()))
    assert (parts["gpu_kernels"], parts["gpu_launches"]) == (40, 3)


def test_on_a_gpu_that_was_not_recorded_preparing_and_launching_are_one_part() -> None:
    host = step_parts([step(1.0, **HOST)], None, on_gpu=True)["host"]
    assert host["prepare and launch"] == 0.3 and "wait for the GPU" in host and "compute" not in host


def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_a_trace_is_added_up_by_what_its_kernels_are_for() -> None:
    times = read_trace(
        [
            event("cuda_runtime", "cudaGraphLaunch", 0, 50),
            event("cuda_runtime", "cudaMemcpyAsync", 60, 5),
            event("cuda_runtime", "cudaStreamSynchronize", 70, 900),
            event("cpu_op", "aten::mm", 0, 1000),
            event("kernel", "argmax_kernel", 400, 20),  # out of order, as a trace may be
            event("kernel", "add_norm_kernel", 100, 10),
            event("kernel", "nvjet_tst_64x64", 110, 100),
            event("kernel", "decode_kernel", 150, 100),  # on another stream, half beside the product
            event("kernel", "add_norm_kernel", 250, 10),
            event("kernel", "nvjet_tst_128x64", 260, 80),
            event("kernel", "splitKreduce_kernel", 340, 10),
            event("gpu_memcpy", "Memcpy DtoH", 420, 3),
        ]
    )
    found = {name: round(seconds * 1e6, 3) for name, seconds in times.by_category.items() if seconds}
    assert found == {
        "attention": 100,
        "matrix products": 100,
        "head": 90,  # both kernels of the product that comes before sampling
        "sampling": 20,
        "norms and embedding": 20,
        "copies": 3,
    }
    assert times.busy_s * 1e6 == pytest.approx(10 + 140 + 10 + 80 + 10 + 20 + 3)
    assert times.launch_s * 1e6 == pytest.approx(55) and (times.num_kernels, times.num_launches) == (8, 2)
    assert next(iter(times.longest)) in ("decode_kernel", "nvjet_tst_64x64")


def test_the_head_is_found_in_every_step_and_only_before_sampling() -> None:
    one = ["embed_norm_kernel", "gemm", "decode_kernel", "gemm", "gemm", "add_norm_kernel", "gemm", "argmax_kernel"]
    names = [*one, "sample_kernel", *one]
    times = read_trace(event("kernel", name, 10 * index, 1) for index, name in enumerate(names))
    assert times.by_category["head"] * 1e6 == pytest.approx(2)
    assert times.by_category["matrix products"] * 1e6 == pytest.approx(6)


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64>", "matrix products"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>", "sampling"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norms and embedding"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", OTHER),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
    ],
)
def test_kernels_of_libraries_are_told_apart_by_name(kernel: str, category: str) -> None:
    assert category_of(kernel) == category


def test_every_kernel_of_the_engine_has_a_category() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(pagebrain.__file__).parent.glob("kernels/*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, flags=re.MULTILINE)}
    assert category_of("decode_kernel") == category_of("write_kernel") == "attention" and "decode_kernel" in kernels
    assert {name for name in kernels if category_of(name) == OTHER} == set(), "name these in CATEGORIES of gpu_times"


def test_a_closer_look_on_a_cpu_tells_the_roof_and_where_the_time_goes(
    llm: LLM, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_steps, "measure_copy", lambda device: 1e9)
    model = MODEL | {"model": model_folder}
    found = look_closer(llm.engine, requests(), GREEDY.params(requests()), model)
    assert found["decode"]["kv_bytes_per_token"] == llm.config.token_bytes and found["decode"]["share"] > 0
    assert found["window"]["num_steps"] > 0 and found["window"]["gpu"] is None
    assert sum(found["window"]["host"].values()) == pytest.approx(found["window"]["seconds"])
    text = printed(found)
    assert all(part in text for part in ("memory roof", "schedule", "prepare", "compute", "detokenize", "rest"))

    run = run_loop(llm.engine, requests(), GREEDY.params(requests()))
    back = look_back(llm.engine, run, model)
    assert back["window"]["num_steps"] == back["decode"]["num_steps"] == sum(step.only_decodes for step in run.steps)
    assert "no closer look at the steps: it broke" in printed({"error": "it broke"})


def test_the_recording_begins_and_ends_with_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class FakeProfile:
        def __init__(self, activities: Any) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def start(self) -> None:
            said.append("start")

        def stop(self) -> None:
            said.append("stop")

        def export_chrome_trace(self, file: str) -> None:
            Path(file).write_text(json.dumps({"traceEvents": [event("kernel", "decode_kernel", 1, 3)]}), encoding="utf-8")

    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    recorder = Recorder("cpu", 2, 3)
    for number in range(6):
        recorder.before_step(number)
        said.append(str(number))
    assert said == ["0", "1", "start", "2", "3", "stop", "4", "5"]
    assert recorder.times().by_category["attention"] == pytest.approx(3e-6) and said.count("stop") == 1
    short = Recorder("cpu", 0, 9)  # the run may end before the window does
    short.before_step(0)
    assert short.times().num_kernels == 1 and said.count("stop") == 2


def test_a_recording_that_fails_does_not_end_the_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("cpu", 1, 2)  # torch refuses to record a GPU that is not there
    monkeypatch.setattr(recorder._profile, "start", lambda: 1 / 0)
    run = run_loop(llm.engine, requests(), GREEDY.params(requests()), before_step=recorder.before_step)
    assert [len(tokens) for tokens in run.token_ids] == [request.output_len for request in requests()]
    with pytest.raises(ZeroDivisionError):
        recorder.times()


def test_a_run_that_is_interrupted_leaves_nothing_in_the_engine(llm: LLM) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_loop(llm.engine, requests(), GREEDY.params(requests()), before_step=interrupt)
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.cache_manager.num_free_blocks == llm.config.num_blocks
    run_loop(llm.engine, requests(), GREEDY.params(requests()))
