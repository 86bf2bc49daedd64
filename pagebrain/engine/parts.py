"""The parts that can be replaced: their protocols, and how a part is found by name and checked.

The engine calls only the methods of these protocols, so a class with the same methods serves real requests:
``parts={"scheduler": MyScheduler}`` in Python, ``--part scheduler=work/my_scheduler.py:Scheduler`` on the command line.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pagebrain.block import BlockManagerPart
from pagebrain.engine.sequence import Sequence, SequenceGroup
from pagebrain.errors import PageBrainError, PartError, is_out_of_memory, place

if TYPE_CHECKING:
    from pagebrain.sampling import SamplerOutput, SampleRow

FEATURES = frozenset({"batch_rows", "cuda_graph", "async_scheduling", "prefix_caching", "beam_search", "swapping"})
"""Features that a part may declare in ``supports``. The engine switches off a feature that a part in use lacks.

``batch_rows`` is for attention backends: they take ``active_rows``, see :class:`pagebrain.attention.ForwardBatch`.
``prefix_caching`` is for block managers, which keep an index of contents, and for schedulers, which start a sequence behind
its cached blocks. ``beam_search`` is for schedulers, which have a method ``continue_with``, and for samplers, which return
log-probabilities. ``swapping`` is for schedulers, which give preempted sequences to ``cache_manager.swap_out``.
"""

ATTENTION_FUNCTION = ("query", "key_pool", "value_pool", "block_tables", "context_lens", "query_starts", "scale")
"""Arguments of an attention part that is a function; see :func:`pagebrain.attention.paged_attention`."""

ATTENTION_BACKEND = {
    "write": ("layer", "pool", "key", "value", "batch"),
    "attend": ("layer", "query", "pool", "batch", "scale"),
}
"""Methods of an attention part that is a backend, and their arguments; see :class:`pagebrain.attention.AttentionBackend`."""


class SchedulerPart(Protocol):
    """Made as ``Scheduler(config, cache_manager)``; see :class:`pagebrain.engine.scheduler.Scheduler`."""

    @property
    def waiting(self) -> SequenceOf[Sequence]: ...
    @property
    def running(self) -> SequenceOf[Sequence]: ...

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        ...

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step; ``None`` if nothing can be computed now.

        Before it returns, ``cache_manager.grow`` must cover each entry's ``context_len``. An entry starts at the sequence's
        ``num_scheduled`` and computes 1 to ``num_unscheduled`` tokens. To preempt a sequence, call its ``preempt`` and then
        ``cache_manager.retire``. The engine sets all other counts and states.
        """
        ...

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence that ended or was aborted; the engine retires its blocks."""
        ...


class SamplerPart(Protocol):
    """Made as ``Sampler(config)``; see :class:`pagebrain.sampling.Sampler`."""

    def sample(self, logits: Tensor, rows: "SequenceOf[SampleRow]") -> "SamplerOutput": ...


_CONSTRUCTORS: dict[str, tuple[str, ...]] = {
    "block_manager": ("config",),
    "scheduler": ("config", "cache_manager"),
    "sampler": ("config",),
}
_PROTOCOLS: dict[str, type] = {
    "block_manager": BlockManagerPart,
    "scheduler": SchedulerPart,
    "sampler": SamplerPart,
}


def find_part(part: str, named: Any, default: Any) -> Any:
    """The object to use for ``part``: ``default``, an object given in Python, or one named as ``path:Name``.

    Raises ``PartError`` if it cannot be found, or if its methods or arguments do not match the protocol.
    """
    if named is None:
        return default
    found = _load(part, named) if isinstance(named, str) else named
    _check(part, found)
    return found


def parts_without(feature: str, parts: dict[str, Any]) -> list[str]:
    """Names of the parts that do not declare support for ``feature``."""
    return [name for name, part in parts.items() if feature not in getattr(part, "supports", frozenset())]


def make_part(part: str, factory: Any, *arguments: Any) -> Any:
    """An instance of a part's class. Raises ``PartError`` if the class raises, or if the instance lacks an attribute."""
    try:
        built = factory(*arguments)
    except PageBrainError:
        raise
    except Exception as error:
        raise PartError(f"{part} {_name_of(factory)} could not be made: {type(error).__name__}: {error}") from error
    protocol = _PROTOCOLS[part]
    for name in [*getattr(protocol, "__annotations__", {}), *vars(protocol)]:
        if not name.startswith("_") and not hasattr(built, name):
            raise PartError(f"{part} {_name_of(type(built))} has no attribute {name!r}")
    return built


def describe_failure(error: Exception) -> str:
    """An exception in one line, with the place where it was raised: the code may be a part that the user wrote."""
    what = "out of memory (lower max_num_batched_tokens or max_num_seqs): " if is_out_of_memory(error) else ""
    return f"{what}{type(error).__name__}: {' '.join(str(error).split())}{place(error)}"


def _load(part: str, named: str) -> Any:
    location, separator, attribute = named.rpartition(":")
    if not separator or not location or not attribute:
        raise PartError(f"part {part}={named!r} must look like path/to/file.py:Name or package.module:Name")
    _make_importable(Path(location) if location.endswith(".py") else None)
    try:
        module = _module_from_file(Path(location)) if location.endswith(".py") else importlib.import_module(location)
    except PartError:
        raise
    except Exception as error:  # code of the user runs at import and may raise any exception
        raise PartError(
            f"part {part}={named!r}: importing {location} failed with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise PartError(f"part {part}={named!r}: {location} defines no {attribute!r}")
    return getattr(module, attribute)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise PartError(f"there is no file {path}: give a path from the current folder, {Path.cwd()}")
    # Files of one name in two folders are two modules. An edited file is a new module, so that a notebook sees the edit.
    key = (str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size)
    name = f"pagebrain_part_{path.stem}_{abs(hash(key)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PartError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(file: Path | None) -> None:
    """Add the current folder, and the folder that holds the file's package, to ``sys.path``.

    The command ``pagebrain`` starts without them, and chapters and the files of learners import ``chapters``.
    """
    folders = [Path.cwd()]
    if file is not None:
        package = file.resolve().parent
        while (package / "__init__.py").is_file():
            package = package.parent
        folders.append(package)
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def _check(part: str, found: Any) -> None:
    """Compare the methods and arguments of ``found`` with those that the engine calls."""
    if not callable(found) and not (part == "attention" and hasattr(found, "attend")):
        kind = "function or an attention backend" if part == "attention" else "class"
        raise PartError(f"{part} {_name_of(found)} cannot be called: name a {kind}")
    unknown = frozenset(getattr(found, "supports", frozenset())) - FEATURES
    if unknown:
        raise PartError(f"{part} {_name_of(found)} supports {sorted(unknown)}: known are {', '.join(sorted(FEATURES))}")
    if part == "attention":
        _check_attention(found)
        return
    if not inspect.isclass(found):
        raise PartError(f"{part} {_name_of(found)} is no class: name one")
    _check_arguments(f"{part} {_name_of(found)}", found, list(_CONSTRUCTORS[part]))
    for name, member in vars(_PROTOCOLS[part]).items():
        if name.startswith("_") or not (callable(member) or isinstance(member, property)):
            continue
        if not hasattr(found, name):
            # __init__ may set a property as an attribute, which the class does not show: make_part checks again.
            if isinstance(member, property):
                continue
            raise PartError(f"{part} {_name_of(found)} has no method {name}{inspect.signature(member)}")
        if callable(member):
            wanted = list(inspect.signature(member).parameters)[1:]
            _check_arguments(f"{part} {_name_of(found)}.{name}", getattr(found, name), wanted, skip_self=True)


def _check_attention(found: Any) -> None:
    """Check a function, a backend, or the class of a backend."""
    name = f"attention {_name_of(found)}"
    if not (inspect.isclass(found) or hasattr(found, "attend")):
        _check_arguments(name, found, list(ATTENTION_FUNCTION))
        return
    if inspect.isclass(found):
        _check_arguments(name, found, [])
    for method, arguments in ATTENTION_BACKEND.items():
        if not callable(getattr(found, method, None)):
            raise PartError(f"{name} has no method {method}({', '.join(arguments)})")
        _check_arguments(f"{name}.{method}", getattr(found, method), list(arguments), skip_self=inspect.isclass(found))


def _check_arguments(what: str, function: Callable[..., Any], wanted: list[str], skip_self: bool = False) -> None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return  # a builtin or a compiled function has no signature
    if skip_self and not isinstance(inspect.getattr_static(function, "__self__", None), type):
        parameters = parameters[1:]
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    for index, name in enumerate(wanted):
        if index >= len(positional):
            if takes_any:
                return
            raise PartError(f"{what} lacks argument {index + 1}, {name!r}: expected ({', '.join(wanted)})")
        if positional[index].name != name:
            raise PartError(
                f"{what} calls argument {index + 1} {positional[index].name!r} where {name!r} is expected: "
                f"({', '.join(wanted)})"
            )
    extra = positional[len(wanted) :] + [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    for parameter in extra:
        if parameter.default is kinds.empty:
            raise PartError(f"{what} wants an argument {parameter.name!r} that the engine does not give: give it a default")


def _name_of(part: Any) -> str:
    return str(getattr(part, "__qualname__", None) or type(part).__qualname__)
