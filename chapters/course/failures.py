"""What an exception in a test means for the tested file: one message for the learner, and a line of that file."""

import linecache
import re
import traceback
from collections.abc import Collection
from pathlib import Path
from types import ModuleType, TracebackType

from chapters.course.diagnoses import diagnose, lead

_MAX_LINES = 20
_MAX_CHARS = 4000
_TIMEOUT = re.compile(r"Timeout \(>([\d.]+)s\) from pytest-timeout")


def explain(error: BaseException, own_files: Collection[Path]) -> tuple[str, str, str]:
    """``(kind, message, where)`` of what a test raised.

    ``kind`` is ``todo`` (a stub was reached), ``timeout``, ``raised`` (the learner's own code raised) or ``failed`` (the
    test says what is wrong). ``where`` is ``file:line: source`` in one of ``own_files``, empty if no frame is in them.
    """
    error = _root(error, own_files)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) in own_files]
    where = _place(own[-1].filename, own[-1].lineno or 0) if own else ""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) in own_files:
        return "raised", f"{type(error).__name__}: {error.msg}", _place(error.filename, error.lineno or 0)
    if isinstance(error, AttributeError) and _file_of(error.obj) in own_files:
        return "failed", f"the file defines no {error.name}", ""
    text = _short(str(error))
    if type(error).__name__ == "TodoError":
        return "todo", text, where
    if timeout := _TIMEOUT.search(text):
        return "timeout", f"still running after {float(timeout[1]):g} seconds: does a loop never end?", where
    if own and not _raised_by_a_test(error.__traceback__, own_files):
        calls = lead(error, own_files)
        return "raised", f"{_exception_line(error)}, {calls}" if calls else _exception_line(error), where
    if isinstance(error, AssertionError) or type(error).__name__ == "Failed":  # pytest.fail, pytest.raises
        return "failed", _test_message(text), where  # a test's code that the learner's called: a hook, a kernel's guard
    return "failed", _exception_line(error), where


def hint_for(error: BaseException, hint: str, own_files: Collection[Path]) -> str:
    """What to show beside a failure: a diagnosis if the exception has one of its own, else the ``hint`` of the test.

    A hint beside the assertion (``tests.support.hints``) goes before that of the test, and not before a diagnosis.
    """
    cause = _root(error, own_files)
    if (kind := explain(error, own_files)[0]) == "todo" or isinstance(cause, SystemExit | MemoryError):
        return ""
    if isinstance(cause, AttributeError) and kind == "failed" and _file_of(cause.obj) in own_files:
        return ""  # the file defines no such thing
    diagnosis = diagnose(cause, own_files)
    return str(getattr(error, "hint", hint)) if diagnosis is None else diagnosis


def is_raised_by(name: str, error: BaseException, own_files: Collection[Path]) -> bool:
    """Whether it was the code of the file ``name`` that raised, and not the learner's or a test's that it called."""
    error = _root(error, own_files)
    names = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [other for other in names if other == name or Path(other) in own_files or _is_test(Path(other))]
    return ours[-1:] == [name]


def _root(error: BaseException, own_files: Collection[Path]) -> BaseException:
    """The exception to report: a stub that was reached, or what the learner's code raised before other code wrapped it."""
    error = _of_kernel(error, own_files)
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for one in chain:
        if type(one).__name__ == "TodoError":
            return one
    while error.__cause__ is not None and not _touches(error, own_files):
        error = error.__cause__
    return error if _touches(error, own_files) else chain[0]


def _of_kernel(error: BaseException, own_files: Collection[Path]) -> BaseException:
    """What a kernel raised in Triton's interpreter, which wraps it, once for each function, and so hides the line."""
    wraps = []
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        wraps.append(error)
        error = error.__cause__
    if wraps and not _touches(error, own_files):  # a function of Triton's raised it: the kernel's line is in a wrap
        inner = next((wrap for wrap in reversed(wraps) if _touches(wrap, own_files)), error)
        return error.with_traceback(inner.__traceback__)
    return error


def _touches(error: BaseException, own_files: Collection[Path]) -> bool:
    return any(Path(frame.filename) in own_files for frame in traceback.extract_tb(error.__traceback__))


def _file_of(module: object) -> Path | None:
    name = module.__file__ if isinstance(module, ModuleType) else None
    return Path(name) if name else None


def _raised_by_a_test(trace: TracebackType | None, own_files: Collection[Path]) -> bool:
    """Whether the exception comes from the tests' code, which the learner's may have called (``on_logits``, say)."""
    innermost = ""
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename)
        if name in own_files or _is_test(name):
            innermost = "own" if name in own_files else "test"
        trace = trace.tb_next
    return innermost == "test"


def _is_test(name: Path) -> bool:
    return "tests" in name.parts[-4:-1]


def _exception_line(error: BaseException) -> str:
    text = _short(str(error))
    if isinstance(error, SystemExit):
        return f"SystemExit: the program was ended with status {error.code!r}; a chapter must not end the program"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _test_message(text: str) -> str:
    """A test's own words, without what pytest adds about the expression."""
    own, _, _ = text.partition("\nassert ")
    if missed := re.match(r"DID NOT RAISE (?:<class '([\w.]+)'>|(.+))", own):
        return f"{(missed[1] or missed[2]).rpartition('.')[2]} should have been raised, but nothing was"
    return own


def _short(text: str) -> str:
    lines = text.strip()[:_MAX_CHARS].splitlines()
    return "\n".join(lines[:_MAX_LINES] + (["..."] if len(lines) > _MAX_LINES else []))


def _place(filename: str, number: int) -> str:
    linecache.checkcache(filename)
    line = linecache.getline(filename, number).strip()
    return f"{Path(filename).name}:{number}" + (f": {line}" if line else "")
