"""The pytest plugin of the chapters' tests: which file they judge, and what is written down about each test.

A test takes the fixture ``chapter``, a module: the reference, or the files named by ``--chapter-file``, each in turn. It
carries one marker ``task("2.1", hint="...")``, and draws what is random from the fixture ``seed``.

With ``--lend-others`` every test is there twice: on the file as it is, and on the file with the functions of all other tasks
lent. The second form runs after all of the first, for the tasks that failed then.
"""

import faulthandler
import gc
import importlib
import json
import os
import sys
from collections.abc import Collection, Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

import pytest

from chapters.course import lending
from chapters.course.catalog import Chapter, in_order
from chapters.course.failures import explain, hint_for, is_raised_by
from chapters.course.running import AGAIN_TIMEOUT_S
from chapters.course.skeleton import solution_regions
from chapters.course.workspace import OwnChapters, load_file

GIGABYTE = 1 << 30


def limit_memory(gigabytes: float) -> bool:
    """Let this process take that much more than it has now; then Python raises ``MemoryError``, torch ``RuntimeError``.

    The limit is on address space, of which torch takes several GB when it is imported: import it first. Returns whether
    there is such a limit on this system (Linux has it; macOS and Windows do not).
    """
    try:
        import resource
    except ImportError:  # Windows
        return False
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * resource.getpagesize() + int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


FOLDER = Path(__file__).resolve().parent.parent
TEST_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Judged:
    """What a test judges: a file, with the functions of the tasks ``lent``; ``again``: this is its second form."""

    path: Path
    lent: frozenset[str] = frozenset()
    again: bool = False


_FILES = pytest.StashKey[dict[str, list[Path]]]()
_LOADED = pytest.StashKey[dict[Judged, "ModuleType | tuple[str, str, str]"]]()
_OWN = pytest.StashKey[Collection[Path]]()  # of earlier chapters
_FAILED = pytest.StashKey[set[tuple[Path, str]]]()
_STATUS = pytest.StashKey[int]()
_ENDLESS = pytest.StashKey[set[tuple[Judged, str]]]()


class _CannotImport(Exception):
    """The graded file failed when it was imported; ``told`` is the report on it."""

    def __init__(self, kind: str, message: str, where: str) -> None:
        super().__init__(f"{message}\n{where}" if where else message)
        self.told = kind, message, where


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the chapters' tests."""
    group = parser.getgroup("chapters")
    group.addoption("--chapter-file", action="append", default=[], metavar="NN=PATH", help="judge this file; repeatable")
    group.addoption("--task", action="append", default=[], metavar="N.M", help="only this task's tests; repeatable")
    group.addoption("--seed", type=int, default=0, metavar="N", help="what random choices of the tests derive from")
    group.addoption(
        "--mine",
        action="append",
        default=[],
        metavar="DIR",
        help="import chapters that have a file in DIR from there (or name one file); repeatable",
    )
    group.addoption("--chapter-report", metavar="FILE", help="write one line of JSON per test")
    group.addoption("--chapter-timeout", type=float, default=TEST_TIMEOUT_S, metavar="S", help="of a test of a file")
    group.addoption("--memory-gb", type=float, default=0, metavar="X", help="what tests may take; 0 for no limit")
    group.addoption(
        "--lend", action="append", default=[], metavar="N.M", help="take this task from the reference; repeatable"
    )
    group.addoption("--lend-others", action="store_true", help="judge a failed task again with all other tasks lent")
    group.addoption("--failed", action="append", default=[], metavar="N.M", help="fails as it is; only judge it again")
    group.addoption(
        "--grace", type=float, default=0, metavar="S", help="end the process if a test goes on so long after its time"
    )
    group.addoption(
        "--in-a-hurry", action="store_true", help="collect no garbage before the tests, and leave without cleaning up"
    )
    group.addoption("--first-failure-only", action="store_true", help="pass over a file's further tests once one failed")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; nothing of a learner's runs yet."""
    if config.getoption("in_a_hurry", False):
        gc.disable()  # until the tests begin: what is imported is no garbage, and looking for some takes half a second
    config.addinivalue_line(
        "markers", "task(id, hint): the exercise that a test belongs to, and what its failure usually means"
    )
    files: dict[str, list[Path]] = {}
    for item in config.getoption("chapter_file", []):
        number, equals, name = item.partition("=")
        path = Path(name).absolute()
        if not equals or not path.is_file():
            raise pytest.UsageError(f"--chapter-file must look like 02=path/to/file.py and name a file, got {item!r}")
        files.setdefault(number, []).append(path)
    config.stash[_FILES] = files
    config.stash[_LOADED] = {}
    failed = config.getoption("failed", [])
    config.stash[_FAILED] = {(path, task) for paths in files.values() for path in paths for task in failed}
    config.stash[_ENDLESS] = set()
    own: dict[str, Path] = {}
    for place in map(Path, config.getoption("mine", [])):
        own |= {path.stem: path.absolute() for path in (place.glob("ch[0-9][0-9]_*.py") if place.is_dir() else [place])}
    if own:
        OwnChapters(own, config.getoption("lend", [])).install()
    config.stash[_OWN] = {path for path in own.values() if path.parent != FOLDER}  # there are skeletons, all lent
    report = config.getoption("chapter_report", None)
    if report and not hasattr(config, "workerinput"):  # with xdist, the workers' reports come together in one process
        config.pluginmanager.register(ReportWriter(Path(report)), "chapter-report")
    if gigabytes := config.getoption("memory_gb", 0):
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")  # takes torch with it
        limit_memory(gigabytes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each file that is to be judged; with ``--lend-others``, once more with the other tasks lent."""
    if "chapter" not in metafunc.fixturenames or not hasattr(metafunc.module, "CHAPTER"):
        return
    paths = metafunc.config.stash[_FILES].get(metafunc.module.CHAPTER, [])
    if not paths:
        return
    lent = frozenset(metafunc.config.getoption("lend", []))
    forms = [(judged_as(path, lent, False), path.stem) for path in paths]
    marks = [*metafunc.definition.iter_markers("task")]
    if marks and marks[0].args and metafunc.config.getoption("lend_others", False):
        regions = solution_regions(_chapter_of(metafunc.module))
        others = frozenset(region.task_id for region in regions) - {marks[0].args[0]}
        if not others <= lent:
            forms += [(judged_as(path, lent | others, True), f"{path.stem}-lent") for path in paths]
    judged, names = zip(*forms, strict=True)
    metafunc.parametrize("chapter", judged, ids=names, indirect=True, scope="module")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """``--in-a-hurry``: end at once. To take down torch and all that was imported takes a second."""
    status = config.stash.get(_STATUS, None)
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # of other ends pytest has more to say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the status for the end."""
    if session.config.getoption("in_a_hurry", False):
        session.config.stash[_STATUS] = int(exitstatus)


@cache
def judged_as(path: Path, lent: frozenset[str], again: bool) -> Judged:
    """One object for each form of a file: pytest sets a fixture up again for another one, be it equal."""
    return Judged(path, lent, again)


@cache
def _chapter_of(module: ModuleType) -> Chapter:
    """The chapter that a module of tests is about."""
    path = Path(str(module.__file__))
    name = path.stem.removeprefix("test_")
    return Chapter(module.CHAPTER, name, path.parents[2] / "chapters" / f"{name}.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test of a chapter belongs to one task; keep those that were asked for, and let none run for ever."""
    wanted = config.getoption("task", [])
    timeout = config.getoption("chapter_timeout", TEST_TIMEOUT_S)
    failed = config.getoption("failed", [])
    dropped = []
    for item in items:
        marks = list(item.iter_markers("task"))
        if hasattr(getattr(item, "module", None), "CHAPTER") and (len(marks) != 1 or not marks[0].args):
            raise pytest.UsageError(f"{item.nodeid} needs exactly one @pytest.mark.task(id, hint=...)")
        judged = _judged_of(item)
        if wanted and (not marks or marks[0].args[0] not in wanted):
            dropped.append(item)
        elif judged is not None and not judged.again and marks[0].args[0] in failed:
            dropped.append(item)
        if judged and config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(timeout))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
    if config.getoption("lend_others", False):
        items.sort(key=_is_second)
    if config.getoption("in_a_hurry", False):
        gc.freeze()
        gc.enable()


def _is_second(item: pytest.Item) -> bool:
    judged = _judged_of(item)
    return judged is not None and judged.again


@pytest.fixture(scope="module")
def chapter(request: pytest.FixtureRequest) -> ModuleType:
    """The chapter under test: the reference, or the file to be judged."""
    number = request.module.CHAPTER
    judged = getattr(request, "param", None)
    if judged is None:
        (name,) = (path.stem for path in FOLDER.glob(f"ch{number}_*.py"))
        return importlib.import_module(f"chapters.{name}")
    loaded = request.config.stash[_LOADED]
    if judged not in loaded:
        name = f"graded_{number}_{len(loaded)}_{judged.path.stem}"
        try:
            loaded[judged] = load_file(judged.path, name, _chapter_of(request.module), judged.lent)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit and a timeout do not raise an Exception
            kind, message, where = explain(error, {judged.path, *request.config.stash[_OWN]})
            loaded[judged] = kind, f"the file cannot be imported: {message}", where
        else:
            if (writer := request.config.pluginmanager.get_plugin("chapter-report")) is not None:
                writer.loaded.touch()
    found = loaded[judged]
    if isinstance(found, tuple):
        raise _CannotImport(*found)
    return found


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What every random choice of a test derives from."""
    return int(request.config.getoption("seed", 0))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Note afresh what is lent, and end the process if a test goes on long after its time: it swallows what stops it."""
    lending.USED.clear()
    mark, grace = item.get_closest_marker("timeout"), item.config.getoption("grace", 0)
    if _judged_of(item) is None or mark is None or not grace:
        return (yield)
    writer = cast(ReportWriter, item.config.pluginmanager.get_plugin("chapter-report"))
    limit = float(mark.args[0])
    if item.config.stash[_ENDLESS]:
        item.add_marker(pytest.mark.timeout(limit := min(limit, AGAIN_TIMEOUT_S)), append=False)
    faulthandler.dump_traceback_later(limit + grace, exit=True, file=writer.stuck)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is settled: a task one of whose tests never ended."""
    judged, mark = _judged_of(item), item.get_closest_marker("task")
    if judged is not None and mark is not None and (judged, mark.args[0]) in item.config.stash[_ENDLESS]:
        pytest.skip("an earlier test of this task did not end")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the course tool wants to know to the report of a test."""
    with lending.hidden_sources():
        report = yield
    mark = item.get_closest_marker("task")
    if mark is None:
        return report
    judged, task = _judged_of(item), mark.args[0]
    kind: str = report.outcome
    message = where = ""
    hint = str(mark.kwargs.get("hint", ""))
    in_lent = False
    if call.excinfo is not None:
        error = call.excinfo.value
        own = {*item.config.stash[_OWN], *([judged.path] if judged is not None else [])}
        kind, message, where = explain(error, own)
        hint = hint_for(error, hint, own)
        if judged is not None:
            in_lent = is_raised_by(lending.lent_name(_chapter_of(cast(Any, item).module)), error, own)
        if isinstance(error, _CannotImport):
            (kind, message, where), hint = error.told, ""
            in_lent = judged is not None and judged.again  # as it is, the file could be imported
        if report.failed and judged is not None:
            item.config.stash[_FAILED].add((judged.path, task))
            if kind == "timeout":
                item.config.stash[_ENDLESS].add((judged, task))
    record = {
        "file": None if judged is None else str(judged.path),
        "task": task,
        "nodeid": item.nodeid,
        "outcome": report.outcome,
        "kind": "skipped" if report.skipped else kind,
        "message": message,
        "where": where,
        "in_lent": in_lent,
        "hint": hint,
        "seconds": round(call.duration, 3),
        "report": _full_report(report) if report.failed else "",
        "lent": [] if judged is None else _lent(judged, _chapter_of(cast(Any, item).module)),
        "answer": {name: _plain(value) for name, value in item.user_properties if name in ("answer", "number")},
    }
    cast(Any, report).chapter_record = record
    return report


def _lent(judged: Judged, chapter: Chapter) -> list[str]:
    """The tasks of which the test that has just run used lent functions. Kernels do not say, so they are named always."""
    unsaid = judged.lent & lending.kernel_tasks(chapter) if judged.lent else set()
    return in_order(lending.USED | unsaid)


def _full_report(report: pytest.TestReport, longest: int = 20_000) -> str:
    """The traceback of a failure and what the test printed: of a very long one, the end."""
    printed = [f"--- {name} ---\n{text.rstrip()}" for name, text in report.sections if text.strip()]
    return "\n".join([report.longreprtext, *printed])[-longest:]


def _plain(value: object, longest: int = 4000) -> float | str:
    """A learner's answer, whatever it is, as something that a report can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return cast(float, value) if is_number else str(value)[:longest]


def _judged_of(item: pytest.Item) -> Judged | None:
    """What a test judges, ``None`` for the reference."""
    found = getattr(item, "callspec", None)
    judged = found.params.get("chapter") if found is not None else None
    return judged if isinstance(judged, Judged) else None


class ReportWriter:
    """Writes one line of JSON per test, as it ends; and beside it, for a process that ends in mid-test, how far it came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path.with_name(path.name + ".plan")
        self.running = path.with_name(path.name + ".running")
        self.loaded = path.with_name(path.name + ".loaded")
        self.done = path.with_name(path.name + ".done")
        self.stuck: TextIO = path.with_name(path.name + ".stuck").open("w", encoding="utf-8")
        path.write_text("", encoding="utf-8")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which tests there are, of the first form and of the second."""
        plans: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for item in session.items:
            if mark := item.get_closest_marker("task"):
                plans[_is_second(item)][item.nodeid] = mark.args[0]
        self.plan.write_text(json.dumps(plans), encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Pass over a test, without a word, if its verdict is known or not wanted.

        That is a test in its second form if its task passed or the file cannot be imported, and with
        ``--first-failure-only`` each test of a file that failed once.
        """
        judged, mark = _judged_of(item), item.get_closest_marker("task")
        if judged is None or mark is None:
            return None
        failed = item.config.stash[_FAILED]
        if judged.again:
            forms = {key: found for key, found in item.config.stash[_LOADED].items() if key.path == judged.path}
            cannot_import = any(isinstance(found, tuple) for found in forms.values())
            is_settled = cannot_import or (judged.path, mark.args[0]) not in failed
        else:
            only_first = item.config.getoption("first_failure_only", False)
            is_settled = only_first and any(path == judged.path for path, _ in failed)
        if not is_settled:
            return None
        item.session._setupstate.teardown_exact(nextitem)  # the test before left standing what this one would have used
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs now."""
        self.running.write_text(nodeid, encoding="utf-8")

    def pytest_sessionfinish(self) -> None:
        """Note that this end is pytest's own."""
        self.done.touch()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The line of a test: of its call, or of a setup or teardown that did not pass."""
        record = getattr(report, "chapter_record", None)
        if record is not None and (report.when == "call" or not report.passed):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
