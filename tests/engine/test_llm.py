"""The front door: prompts of any kind in, outputs in order, streams that can be left at any time."""

import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.engine import engine
from pagebrain.engine.trace import StepTrace
from tests.support.models import random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(params=[False, True], ids=["depth 0", "depth 1"])
def llm(request: pytest.FixtureRequest) -> LLM:
    base = random_gpt2(vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256)
    return LLM(base, byte_tokenizer(), num_blocks=32, block_size=4, async_scheduling=request.param, check_integrity=True)


def test_prompts_may_be_texts_or_token_ids_one_or_many(llm: LLM) -> None:
    ids = byte_tokenizer().encode("abc")
    one = llm.generate("abc", GREEDY, use_tqdm=False)
    assert [output.prompt for output in one] == ["abc"] and one[0].prompt_token_ids == tuple(ids)
    same = llm.generate(ids, GREEDY, use_tqdm=False)
    assert same[0].prompt is None and same[0].outputs == one[0].outputs
    many = llm.generate(["x", ids, "abc", [5]], GREEDY, use_tqdm=False)
    assert [len(output.prompt_token_ids) for output in many] == [1, 3, 3, 1]
    assert many[1].outputs == many[2].outputs == one[0].outputs
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_without_deltas_only_the_end_of_a_request_comes_out(llm: LLM) -> None:
    """As generate asks for it; all of it is in that one delta, with several samples too."""
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=5, ignore_eos=True)
    expected = llm.generate([1, 2, 3], params, use_tqdm=False)[0]
    llm.engine.add_request([1, 2, 3], params, wants_deltas=False)
    deltas = []
    while llm.engine.has_unfinished_requests:
        deltas += llm.engine.step()
    (delta,) = deltas
    assert delta.finished is not None
    assert [sample.token_ids for sample in delta.finished.outputs] == [sample.token_ids for sample in expected.outputs]


@pytest.mark.parametrize("num_blocks", [32, 5], ids=["", "preempted"])
def test_a_request_that_keeps_no_logprobs_has_them_in_its_deltas_alone(num_blocks: int) -> None:
    """As the server asks for it: it holds them itself."""
    base = random_gpt2(vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256)
    llm = LLM(base, byte_tokenizer(), num_blocks=num_blocks, block_size=4, check_integrity=True)
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    [expected] = llm.generate([1, 2, 3, 4, 5], params, use_tqdm=False)
    request = llm.engine.add_request([1, 2, 3, 4, 5], params, keeps_logprobs=False)
    sequences = llm.engine.outputs.requests[request.request_id].sequences
    deltas = []
    while llm.engine.has_unfinished_requests:
        deltas += llm.engine.step()
        assert not any(seq.logprobs for seq in sequences)
    assert not any(seq.prompt_logprobs for seq in sequences)
    assert (sum(seq.num_preemptions for seq in sequences) > 0) == (num_blocks == 5)
    assert [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs] == [expected.prompt_logprobs]
    for sample in expected.outputs:
        assert sample.logprobs == tuple(score for delta in deltas if delta.index == sample.index for score in delta.logprobs)
    finished = deltas[-1].finished
    assert finished is not None and finished.prompt_logprobs is None
    assert [(out.logprobs, out.cumulative_logprob) for out in finished.outputs] == [(None, None)] * 2


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 1)]
    assert [len(out.outputs[0].token_ids) for out in llm.generate(["a", "b", "c"], each, use_tqdm=False)] == [3, 9, 1]


def test_a_stream_brings_the_same_text_piece_by_piece(llm: LLM) -> None:
    whole = llm.generate("once", GREEDY, use_tqdm=False)[0]
    deltas = list(llm.stream("once", GREEDY))
    assert len(deltas) == 8 and "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["length"]
    assert deltas[-1].finished is not None and deltas[-1].finished.outputs == whole.outputs


def test_streams_read_in_turn_do_not_lose_each_others_tokens(llm: LLM) -> None:
    first, second = llm.stream("a", GREEDY), llm.stream("b", GREEDY)
    texts = ["", ""]
    for left, right in zip(first, second, strict=True):
        texts[0] += left.text
        texts[1] += right.text
    assert texts == [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text for prompt in "ab"]


def test_a_stream_that_is_left_gives_its_blocks_back(llm: LLM) -> None:
    stream = llm.stream("a" * 20, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    next(stream)
    assert llm.engine.cache_manager.num_free_blocks < 32
    stream.close()
    assert llm.engine.cache_manager.num_free_blocks == 32 and not llm.engine.has_unfinished_requests


def test_without_anything_to_generate_a_prompt_is_scored_up_to_the_whole_context(llm: LLM) -> None:
    ids = [(7 * position) % VOCAB_SIZE for position in range(64)]
    shorter, full = (SamplingParams(max_tokens=count, prompt_logprobs=2, seed=1) for count in (1, 0))
    [expected] = llm.generate([ids[:63]], shorter, use_tqdm=False)
    last = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    [following] = llm.generate([ids[:63]], last, use_tqdm=False)
    outputs = llm.generate([ids, [5], ids[:9], ids], [full, full, GREEDY, SamplingParams(max_tokens=0, n=2)], use_tqdm=False)
    scores = outputs[0].prompt_logprobs
    assert scores is not None and len(scores) == 64 and expected.prompt_logprobs is not None
    for got, wanted in zip(scores[:63], expected.prompt_logprobs, strict=True):
        assert got == wanted or (got is not None and wanted is not None and abs(got.logprob - wanted.logprob) < 1e-9)
    assert scores[63] is not None and scores[63].token_id == ids[63] and following.outputs[0].logprobs is not None
    for (token_id, logprob), (wanted_id, wanted_logprob) in zip(scores[63].top, following.outputs[0].logprobs[0].top):
        assert token_id == wanted_id and abs(logprob - wanted_logprob) < 1e-9
    for output in (outputs[0], outputs[1], outputs[3]):
        assert {(sample.text, sample.token_ids, sample.finish_reason) for sample in output.outputs} == {("", (), "length")}
    assert len(outputs[3].outputs) == 2 and outputs[1].prompt_logprobs == (None,)
    assert len(outputs[2].outputs[0].token_ids) == 8, "what else was under way"
    [delta] = llm.stream(ids, full)
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((), "", "length") and delta.prompt_logprobs == scores
    assert llm.engine.cache_manager.num_free_blocks == 32


def test_samples_of_one_request_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=3, n=4, ignore_eos=True)
    first = llm.generate("q", params, use_tqdm=False)[0]
    assert [sample.index for sample in first.outputs] == [0, 1, 2, 3]
    assert len({sample.token_ids for sample in first.outputs}) == 4
    assert llm.generate(["other", "q"], params, use_tqdm=False)[1].outputs == first.outputs
    other = llm.generate("q", SamplingParams(temperature=1.0, max_tokens=12, seed=4, n=4, ignore_eos=True), use_tqdm=False)[
        0
    ]
    assert other.outputs != first.outputs


def test_requests_without_a_seed_differ_within_an_engine_and_repeat_in_the_next() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def run(seed: int) -> list[tuple[int, ...]]:
        llm = LLM(random_gpt2(), num_blocks=32, seed=seed)
        return [output.outputs[0].token_ids for output in llm.generate([[1, 2]] * 3, params, use_tqdm=False)]

    assert run(0) == run(0) and run(0) != run(1) and len(set(run(0))) == 3


def test_stop_strings_end_a_sample_and_are_cut_off(llm: LLM) -> None:
    text = (
        llm.generate("tell", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)[0]
        .outputs[0]
        .text
    )
    stop = text[6:9]
    assert len(stop) == 3
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=stop)
    sample = llm.generate("tell", params, use_tqdm=False)[0].outputs[0]
    assert sample.text == text[: text.index(stop)]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert "".join(delta.text for delta in llm.stream("tell", params)) == sample.text


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate("a", GREEDY, use_tqdm=False)[0].metrics
    assert metrics.first_scheduled_s is not None and metrics.first_token_s is not None and metrics.finished_s is not None
    assert metrics.arrival_s <= metrics.first_scheduled_s <= metrics.first_token_s <= metrics.finished_s


def test_a_trace_tells_all_about_a_step(llm: LLM) -> None:
    traces: list[StepTrace] = []
    llm.engine.observers.append(traces.append)
    llm.generate(["a" * 9, "b"], GREEDY, use_tqdm=False)
    assert [trace.step for trace in traces] == list(range(traces[0].step, traces[0].step + len(traces)))
    first = traces[0]
    assert [(row.phase, row.start, row.num_tokens, row.samples) for row in first.rows] == [
        ("prefill", 0, 9, True),
        ("prefill", 0, 1, True),
    ]
    assert [len(table) for table in first.block_tables.values()] == [3, 1]
    for trace in traces:
        held = [block for table in trace.block_tables.values() for block in table]
        assert sorted(held + list(trace.free_blocks)) == list(range(trace.num_blocks))
        assert all(
            len(trace.block_tables[row.seq_id]) * trace.block_size >= row.start + row.num_tokens for row in trace.rows
        )
        assert trace.launched_s <= trace.read_s
    assert sorted(seq_id for trace in traces for seq_id in trace.finished) == sorted(first.block_tables)
    with pytest.raises(AttributeError):
        first.step = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        first.block_tables[0] = ()  # type: ignore[index]


def test_without_observers_no_trace_is_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "trace_step", lambda *args: pytest.fail("a trace was made without an observer"))
    llm.generate("a", GREEDY, use_tqdm=False)
