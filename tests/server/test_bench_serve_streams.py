"""``bench serve`` reads what came back: server-sent events cut anywhere, several in a piece, answers that are not whole."""

import json
from typing import Any

import pytest

from pagebrain.bench.serve.measurements import Exchange, RequestRecord, events, read_exchange

USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def token(text: str = " a", finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def sse(*payloads: dict[str, Any], done: bool = True) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in payloads) + b"data: [DONE]\n\n" * done


def read(*chunks: bytes) -> RequestRecord:
    """A request sent at 100 s, 10 s into the load, whose chunks came a second apart from 101 s on."""
    times = [101.0 + number for number in range(len(chunks))]
    return read_exchange(Exchange(0, 99.75, 100.0, times[-1] if times else 100.0, times, list(chunks)), start_s=90.0)


def test_an_event_gets_the_time_of_the_chunk_that_completes_it_wherever_it_is_cut() -> None:
    stream = b": hello\r\n\r\ndata: {}\r\n\r\ndata: one\ndata: two\n\ndata:tight\n\n"
    for cut in range(len(stream) + 1):
        found = list(events([1.0, 2.0], [stream[:cut], stream[cut:]]))
        assert [data for _, data in found] == [b"{}", b"one\ntwo", b"tight"], cut
        assert [when for when, _ in found] == [
            1.0 if stream[:cut].count(end) else 2.0 for end in (b"{}\r\n\r\n", b"two\n\n", b"tight\n\n")
        ]


def test_times_count_from_sending_and_gaps_lie_between_events() -> None:
    record = read(sse(token(), done=False), sse(token(), token(), done=False), sse(token("", "length"), USAGE))
    assert record.outcome == "done"
    assert (record.sent_s, record.ended_s, record.late_s) == (10.0, 13.0, 0.25)
    assert (record.ttft_s, record.e2e_s) == (1.0, 3.0)
    assert record.tpot_s == pytest.approx(2 / 3)
    assert record.gaps_s == (1.0, 0.0, 1.0)
    assert (record.prompt_tokens, record.output_tokens, record.num_events) == (3, 4, 4)


def test_what_comes_after_the_last_token_takes_no_part() -> None:
    record = read(sse(*[token()] * 3, token(finish_reason="stop"), done=False), sse(USAGE, done=False), sse())
    assert (record.outcome, record.e2e_s, record.ended_s) == ("done", 1.0, 13.0)


def test_a_closing_event_without_text_is_a_token_only_if_one_is_missing_without_it() -> None:
    extra = read(sse(*[token()] * 4, done=False), sse(token("", "length"), USAGE))
    assert (extra.num_events, extra.e2e_s) == (4, 1.0)
    needed = read(sse(*[token("")] * 3, done=False), sse(token("", "length"), USAGE))
    assert (needed.num_events, needed.e2e_s) == (4, 2.0)


def test_without_usage_each_event_is_a_token() -> None:
    record = read(sse(token(), token(), token(finish_reason="length")))
    assert (record.outcome, record.output_tokens, record.num_output_tokens) == ("done", None, 3)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (sse(token(finish_reason="length"), USAGE, done=False), "the stream ended without [DONE]"),
        (sse(token(), {"error": {"message": "the engine\n died"}}), "an error in the stream: the engine died"),
        (sse(token(finish_reason="abort"), USAGE), "the output ended with finish_reason 'abort'"),
        (sse(token(), USAGE), "the output ended with finish_reason None"),
        (sse(USAGE), "the stream brought no token"),
        (b"data: {oops\n\n", "an event is no JSON object: b'{oops'"),
        (b"data: 3\n\n", "an event is no JSON object: b'3'"),
        (b'{"object": "text_completion"}', "the stream ended without [DONE]"),
        (b"", "the stream ended without [DONE]"),
    ],
)
def test_an_answer_that_is_not_whole_has_failed_and_says_why(stream: bytes, reason: str) -> None:
    record = read(stream)
    assert (record.outcome, record.reason) == ("failed", reason)
    assert record.ttft_s is record.e2e_s is record.tpot_s is None


def test_a_refusal_is_told_from_a_failure() -> None:
    assert read_exchange(Exchange(0, 1.0, 1.0, 2.0, error="full", is_refused=True), 0.0).outcome == "refused"
    assert read_exchange(Exchange(0, 1.0, 1.0, 2.0, error="gone"), 0.0).outcome == "failed"
