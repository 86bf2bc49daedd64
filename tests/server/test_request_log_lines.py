"""The request log, a line of JSON for each request with its figures and none of its texts; and where all lines go."""

import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from pagebrain.errors import ConfigError
from pagebrain.outputs import RequestMetrics
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.api.request_log import LOGGED_PARAMS, RequestLog
from pagebrain.server.link.observers import ServerObserver
from pagebrain.server.link.streams import RequestStream
from pagebrain.server.logs import LineFormatter, logging_config

SECRET = "secret-prompt-words"


class Lines(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged(request: RequestStream, outcome: str) -> dict[str, Any]:
    """The line that a request's end makes."""
    logger, handler = logging.Logger("test", logging.INFO), Lines()
    logger.addHandler(handler)
    observer: ServerObserver = RequestLog(logger, clock=lambda: 104.5)  # mypy checks the signatures
    observer.on_first_token(request, 1.0)
    observer.on_tokens(1, [0.1])
    observer.on_finished(request, outcome)
    (line,) = handler.lines
    assert "\n" not in line and line.isascii()
    entry: dict[str, Any] = json.loads(line)
    return entry


def request_of(params: SamplingParams | None = None) -> RequestStream:
    params = SamplingParams() if params is None else params
    stream = RequestStream("cmpl-1", (11111, 22222), params, on_close=lambda _: None)
    stream.arrival_s, stream.first_token_s, stream.num_generated = 100.0, 102.25, 7
    stream.metrics = RequestMetrics(
        arrival_s=100.1, first_scheduled_s=101.5, first_token_s=102.2, finished_s=104.0, num_preemptions=3
    )
    return stream


def test_a_line_says_who_how_much_how_long_and_how_it_ended() -> None:
    request = request_of(SamplingParams(temperature=0.5, max_tokens=7, seed=1))
    request.user = "a user"
    entry = logged(request, "length")
    written = datetime.fromisoformat(entry.pop("time"))
    assert written.utcoffset() == timedelta(0) and abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)
    assert entry == {
        "request_id": "cmpl-1",
        "user": "a user",
        "outcome": "length",
        "prompt_tokens": 2,
        "cached_tokens": None,
        "generated_tokens": 7,
        "queue_s": 1.5,
        "ttft_s": 2.25,
        "e2e_s": 4.5,
        "preemptions": 3,
        "params": {"temperature": 0.5, "max_tokens": 7, "seed": 1},
    }


def test_what_never_happened_is_null() -> None:
    request = request_of()
    request.first_token_s, request.metrics = None, None
    entry = logged(request, "abort")
    assert [entry[name] for name in ("user", "queue_s", "ttft_s", "preemptions")] == [None] * 4
    assert entry["outcome"] == "abort" and entry["e2e_s"] == 4.5


def test_nothing_that_is_made_of_text_is_logged() -> None:
    biases = {33333: 1.0}
    params = SamplingParams(stop=[SECRET], stop_token_ids=[44444], logit_bias=biases, include_stop_str_in_output=True)
    line = json.dumps(logged(request_of(params), "stop"))
    for part in (SECRET, "11111", "22222", "33333", "44444"):
        assert part not in line
    assert "include_stop_str_in_output" in line


def test_every_sampling_parameter_is_either_logged_or_made_of_text() -> None:
    assert set(vars(SamplingParams())) - set(LOGGED_PARAMS) == {"stop", "stop_token_ids", "logit_bias"}
    assert set(LOGGED_PARAMS) <= set(vars(SamplingParams()))


def test_a_users_name_can_neither_break_the_line_nor_fill_the_log() -> None:
    request = request_of()
    request.user = '"}\n{"forged": 1}\x1b[31m' + "x" * 100_000
    entry = logged(request, "stop")
    assert entry["user"].startswith('"}\n{"forged"') and len(entry["user"]) == 256


# Where lines go -------------------------------------------------------------------------------------------------------


def stderr_of(script: str, log_level: str = "info", log_requests: bool = False) -> str:
    """What a process writes to standard error after ``configure_logging``; nothing may go to standard output."""
    lines = [
        "import asyncio, logging, warnings",
        "from pagebrain.server.logs import configure_logging",
        f"configure_logging({log_level!r}, {log_requests!r})",
        f"secret = {SECRET!r}",
        script,
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout == ""
    return run.stderr


def test_a_calm_log_holds_what_is_worth_knowing_in_one_form() -> None:
    script = """
logging.getLogger("pagebrain.engine.engine").info("ready")
logging.getLogger("pagebrain.engine.engine").warning("a step failed")
logging.getLogger("uvicorn.error").info("Started server process")
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", "/", "1.1", 200)
logging.getLogger("another.package").info("chatter")
logging.getLogger("pagebrain.requests").info("{}")
"""
    assert stderr_of(script).splitlines() == [
        "pagebrain: ready",
        "pagebrain: warning: a step failed",
        "pagebrain: warning: Invalid HTTP request received.",
    ]


def test_lines_of_requests_come_once_and_bare_when_they_are_wanted() -> None:
    script = """logging.getLogger("pagebrain.requests").info("{}")"""
    assert stderr_of(script, log_requests=True) == "{}\n"
    assert stderr_of(script, "error", log_requests=True) == "{}\n"
    assert stderr_of(script) == ""


FAILURES = {
    "an exception and its cause": """
try:
    try:
        int(secret)
    except ValueError as error:
        raise RuntimeError("it was " + secret) from error
except RuntimeError:
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
""",
    "pydantic's error": """
import pydantic
class Body(pydantic.BaseModel):
    prompt: int
try:
    Body(prompt=secret)
except pydantic.ValidationError:
    logging.getLogger("pagebrain.server").exception("it failed")
""",
    "pydantic's warning": """
import pydantic
class Body(pydantic.BaseModel):
    prompt: int
body = Body(prompt=1)
body.prompt = secret
body.model_dump_json()
logging.getLogger("pagebrain.server").warning("the test has come this far: Error")
""",
    "a task that was never awaited": """
async def fail():
    raise RuntimeError(secret)
async def main():
    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_logged_without_what_it_quotes(name: str) -> None:
    text = stderr_of(FAILURES[name])
    assert "Error" in text and SECRET not in text
    assert SECRET in stderr_of(FAILURES[name], "debug"), "nothing was quoted in the first place"


def test_a_withheld_traceback_still_says_where_and_in_what_order() -> None:
    text = stderr_of(FAILURES["an exception and its cause"])
    assert text.startswith("pagebrain: error: Exception in ASGI application\nTraceback (most recent call last):\n")
    assert text.index("builtins.ValueError") < text.index("which led to:") < text.index("builtins.RuntimeError")
    assert text.count('File "<string>", line ') == 2


def test_a_group_of_exceptions_names_its_members() -> None:
    class Group(Exception):
        exceptions = (ValueError(SECRET), KeyError(SECRET))

    text = LineFormatter().formatException((Group, Group(SECRET), None))
    assert "builtins.ValueError" in text and "builtins.KeyError" in text and SECRET not in text


def test_exceptions_that_lead_to_each_other_are_written_once() -> None:
    first, second = ValueError(SECRET), KeyError(SECRET)
    first.__context__, second.__context__ = second, first
    text = LineFormatter().formatException((ValueError, first, None))
    assert text.count("builtins.ValueError") == text.count("builtins.KeyError") == 1


def test_what_another_formatter_wrote_into_the_record_is_not_used() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    assert SECRET in logging.Formatter().format(record)
    assert SECRET not in LineFormatter().format(record)
    assert record.exc_text is not None and SECRET in record.exc_text  # and the record is as it was


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of critical, error, warning, info, debug, got 'loud'"):
        logging_config("loud")


def test_uvicorn_makes_no_access_lines() -> None:
    script = """
import uvicorn
from pagebrain.server.logs import logging_config
uvicorn.Config("x:y", log_config=logging_config("info", True))
assert not logging.getLogger("uvicorn.access").hasHandlers()
"""
    assert stderr_of(script) == ""
