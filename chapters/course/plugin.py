"""The pytest plugin of the chapters' tests: which file they judge, and what is written down about each test.

A test takes the fixture ``chapter``, a module: the reference, or the files named by ``--chapter-file``, each in turn. It
carries one marker ``task("2.1", hint="...")``, and draws what is random from the fixture ``seed``.
"""

import importlib
import json
from collections.abc import Collection, Generator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from chapters.course.failures import explain
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
TEST_TIMEOUT_S = 20.0

_FILES = pytest.StashKey[dict[str, list[Path]]]()
_LOADED = pytest.StashKey[dict[Path, "ModuleType | tuple[str, str, str]"]]()
_OWN = pytest.StashKey[Collection[Path]]()
_FAILED = pytest.StashKey[set[Path]]()
_ENDLESS = pytest.StashKey[set[tuple[Path, str]]]()


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
    group.addoption("--first-failure-only", action="store_true", help="skip a file's further tests once one failed")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; nothing of a learner's runs yet."""
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
    config.stash[_FAILED] = set()
    config.stash[_ENDLESS] = set()
    own: dict[str, Path] = {}
    for place in map(Path, config.getoption("mine", [])):
        own |= {path.stem: path.absolute() for path in (place.glob("ch[0-9][0-9]_*.py") if place.is_dir() else [place])}
    if own:
        OwnChapters(own).install()
    config.stash[_OWN] = {*own.values(), *(path for paths in files.values() for path in paths)}
    report = config.getoption("chapter_report", None)
    if report and not hasattr(config, "workerinput"):  # with xdist, the workers' reports come together in one process
        config.pluginmanager.register(ReportWriter(Path(report)), "chapter-report")
    if gigabytes := config.getoption("memory_gb", 0):
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")  # takes torch with it
        limit_memory(gigabytes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each file that is to be judged."""
    if "chapter" not in metafunc.fixturenames or not hasattr(metafunc.module, "CHAPTER"):
        return
    paths = metafunc.config.stash[_FILES].get(metafunc.module.CHAPTER, [])
    if paths:
        metafunc.parametrize("chapter", paths, ids=[path.stem for path in paths], indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test of a chapter belongs to one task; keep those that were asked for, and let none run for ever."""
    wanted = config.getoption("task", [])
    timeout = config.getoption("chapter_timeout", TEST_TIMEOUT_S)
    dropped = []
    for item in items:
        marks = list(item.iter_markers("task"))
        if hasattr(getattr(item, "module", None), "CHAPTER") and (len(marks) != 1 or not marks[0].args):
            raise pytest.UsageError(f"{item.nodeid} needs exactly one @pytest.mark.task(id, hint=...)")
        if wanted and (not marks or marks[0].args[0] not in wanted):
            dropped.append(item)
        if _path_of(item) and config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(timeout))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(scope="module")
def chapter(request: pytest.FixtureRequest) -> ModuleType:
    """The chapter under test: the reference, or the file to be judged."""
    number = request.module.CHAPTER
    path = getattr(request, "param", None)
    if path is None:
        (name,) = (path.stem for path in FOLDER.glob(f"ch{number}_*.py"))
        return importlib.import_module(f"chapters.{name}")
    loaded = request.config.stash[_LOADED]
    if path not in loaded:
        try:
            loaded[path] = load_file(path, f"graded_{number}_{len(loaded)}_{path.stem}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit and a timeout do not raise an Exception
            kind, message, where = explain(error, request.config.stash[_OWN])
            loaded[path] = kind, f"the file cannot be imported: {message}", where
        else:
            if (writer := request.config.pluginmanager.get_plugin("chapter-report")) is not None:
                writer.loaded.touch()
    found = loaded[path]
    if isinstance(found, tuple):
        raise _CannotImport(*found)
    return found


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What every random choice of a test derives from."""
    return int(request.config.getoption("seed", 0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is settled: a task one of whose tests never ended, or (``--first-failure-only``) a file that failed once."""
    path, mark = _path_of(item), item.get_closest_marker("task")
    if item.config.getoption("first_failure_only", False) and path in item.config.stash[_FAILED]:
        pytest.skip("an earlier test of this file failed")
    if mark and (path, mark.args[0]) in item.config.stash[_ENDLESS]:
        pytest.skip("an earlier test of this task did not end")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the course tool wants to know to the report of a test."""
    report = yield
    mark = item.get_closest_marker("task")
    if mark is None:
        return report
    path = _path_of(item)
    kind: str = report.outcome
    message = where = ""
    is_import = False
    if call.excinfo is not None:
        error = call.excinfo.value
        kind, message, where = explain(error, item.config.stash[_OWN])
        if is_import := isinstance(error, _CannotImport):
            kind, message, where = error.told
        if report.failed and path is not None:
            item.config.stash[_FAILED].add(path)
            if kind == "timeout":
                item.config.stash[_ENDLESS].add((path, mark.args[0]))
    record = {
        "file": None if path is None else str(path),
        "task": mark.args[0],
        "nodeid": item.nodeid,
        "outcome": report.outcome,
        "kind": "skipped" if report.skipped else kind,
        "message": message,
        "where": where,
        "hint": "" if is_import else _hint(call, mark),
        "seconds": round(call.duration, 3),
    }
    cast(Any, report).chapter_record = record
    return report


def _hint(call: pytest.CallInfo[None], mark: pytest.Mark) -> str:
    """The hint beside what failed (``tests.support.hints``), otherwise that of the test."""
    error = call.excinfo.value if call.excinfo is not None else None
    return str(getattr(error, "hint", mark.kwargs.get("hint", "")))


def _path_of(item: pytest.Item) -> Path | None:
    """The judged file of a test, ``None`` for the reference."""
    found = getattr(item, "callspec", None)
    path = found.params.get("chapter") if found is not None else None
    return path if isinstance(path, Path) else None


class ReportWriter:
    """Writes one line of JSON per test, as it ends; and beside it, for a process that ends in mid-test, how far it came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path.with_name(path.name + ".plan")
        self.running = path.with_name(path.name + ".running")
        self.loaded = path.with_name(path.name + ".loaded")
        self.done = path.with_name(path.name + ".done")
        path.write_text("", encoding="utf-8")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which tests there are."""
        tasks = {item.nodeid: mark.args[0] for item in session.items if (mark := item.get_closest_marker("task"))}
        self.plan.write_text(json.dumps(tasks), encoding="utf-8")

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
