"""The structure of the package: imports go downward, the host side knows no device code, Triton is in one folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pagebrain

ROOT = Path(pagebrain.__file__).parent

LAYERS = (
    {"errors", "machine", "assets", "quiet", "standard_streams"},
    {"swap_space"},
    {"outputs", "sampling_params", "generation_config", "devices"},
    {"model_config"},
    {"config"},
    {"block"},
    {"cache"},
    {"engine"},
    {"sampling"},
    {"kernels"},
    {"attention", "layers"},
    {"models"},
    {"worker"},
    {"build"},
    {"llm"},
    {"viz"},
    {"bench", "server"},
    {"cli"},
    {"__main__"},
)
"""Modules and folders of ``pagebrain``, the lowest first. One imports from its own folder, and from layers below its own."""

HOST = {"block", "cache", "engine", "swap_space"}
DEVICE = {"attention", "kernels", "layers", "models", "sampling", "worker"}

OWNED_POOL = ("cache", "attention.kv_pool")
"""The one arrow that runs up, within ``CacheManager.pool``: a cache manager owns its tensors, and makes them when asked."""


def module_name(path: Path) -> str:
    """``engine.engine`` for ``engine/engine.py``, ``engine`` for its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def runtime_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that are executed, at once or within a function: not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from runtime_imports(node)


PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def arrows() -> set[tuple[str, str]]:
    """``(module, module that it imports)``, both of ``pagebrain``."""
    found = set()
    for name, path in PATHS.items():
        for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{name}: imports are absolute, so that this test sees them"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target.removeprefix("pagebrain.") in PATHS else node.module for target in targets]
            else:
                targets = [alias.name for alias in node.names]
            for target in targets:
                if target.startswith("pagebrain."):
                    found.add((name, target.removeprefix("pagebrain.")))
    return found


ARROWS = arrows()


def unit(name: str) -> str:
    """The module or the folder right below ``pagebrain``."""
    return name.partition(".")[0]


def layer_of(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit(name) in layer)


def test_every_module_has_a_layer() -> None:
    assert len(ARROWS) > 300
    units = [name for layer in LAYERS for name in layer]
    assert sorted(units) == sorted({unit(name) for name in PATHS} - {"__init__"})


def test_imports_go_down() -> None:
    up = {(a, b) for a, b in ARROWS if unit(a) not in ("__init__", unit(b)) and layer_of(a) <= layer_of(b)}
    assert up == {OWNED_POOL}


def test_no_module_imports_itself_by_way_of_others() -> None:
    imported: dict[str, set[str]] = {}
    for importer, target in ARROWS - {OWNED_POOL}:
        imported.setdefault(importer, set()).add(target)
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a cycle of imports: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for target in sorted(imported.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    for name in PATHS:
        visit(name, ())


def test_the_hosts_half_imports_no_device_code() -> None:
    assert {(a, b) for a, b in ARROWS if unit(a) in HOST and unit(b) in DEVICE} == {OWNED_POOL}


def test_triton_is_imported_in_one_folder() -> None:
    importers = set()
    for name, path in PATHS.items():
        for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(target.partition(".")[0] == "triton" for target in names):
                importers.add(name)
    assert importers and {unit(name) for name in importers} == {"kernels"}


def test_modules_have_names_of_their_own() -> None:
    """Two modules of one base name are told apart by their folders alone, in a list of open files for instance."""
    names = [name.rpartition(".")[2] for name, path in PATHS.items() if path.stem != "__init__"]
    assert {name for name in names if names.count(name) > 1} == set()
