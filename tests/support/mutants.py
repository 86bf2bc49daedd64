"""Mutants of the chapters' solutions: one operator, constant or statement changed by rule, as a slip of the hand would.

Which of them the chapters' tests catch says how closely those tests look. A mutant is named by what changed and where:
``PagedCache.slots: start + count -> start - count``; a second one of that name gets a number.
"""

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
}
NAMES = {"min": "max", "max": "min", "amax": "amin", "append": "extend", "appendleft": "append", "maximum": "minimum"}
MARKER = re.compile(r"# (?:BEGIN SOLUTION (?P<task>\d+\.\d+)|END SOLUTION)$")


@dataclass(frozen=True)
class Mutant:
    """A chapter's whole source with one change in a solution of ``task``."""

    task: str
    name: str
    source: str


def regions(source: str) -> list[tuple[str, range]]:
    """Task and lines of each solution."""
    found: list[tuple[str, range]] = []
    begun: tuple[str, int] | None = None
    for number, line in enumerate(source.splitlines(), start=1):
        if match := MARKER.search(line):
            if match["task"]:
                begun = match["task"], number
            elif begun:
                found.append((begun[0], range(begun[1] + 1, number)))
    return found


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of all solutions in a chapter's source, in order."""
    tree = ast.parse(source)
    inside = {line: task for task, lines in regions(source) for line in lines}
    owners = _owners(tree)
    messages = {inner for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
    seen: dict[str, int] = {}
    for index, node in enumerate(ast.walk(tree)):
        task = inside.get(getattr(node, "lineno", 0))
        if task is None or node in messages or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue  # the wording of an error is no exercise
        for variant in range(_num_variants(node)):
            changed = copy.deepcopy(tree)
            place = next(other for number, other in enumerate(ast.walk(changed)) if number == index)
            before = ast.unparse(place)
            after = _change(changed, place, variant)
            name = f"{owners[node.lineno]}: {_short(before)} -> {_short(after)}"  # type: ignore[attr-defined]
            seen[name] = seen.get(name, 0) + 1
            yield Mutant(task, name if seen[name] == 1 else f"{name} ({seen[name]})", ast.unparse(changed) + "\n")


def _owners(tree: ast.Module) -> dict[int, str]:
    """Line -> name of the outermost function around it, with its class."""
    owners: dict[int, str] = {}
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                owners |= dict.fromkeys(range(member.lineno, (member.end_lineno or 0) + 1), prefix + member.name)
    return owners


def _num_variants(node: ast.AST) -> int:
    """In how many ways a node can be changed."""
    if isinstance(node, ast.Constant):
        whole_number = isinstance(node.value, int) and not isinstance(node.value, bool)
        return 2 if whole_number else int(isinstance(node.value, bool))
    if isinstance(node, ast.Compare):
        return int(len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS)
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        return int(type(node.op) in ARITHMETIC) + int(isinstance(node, ast.AugAssign))
    if isinstance(node, ast.Call):
        return int(_called(node) in NAMES)
    if isinstance(node, ast.UnaryOp):
        return int(isinstance(node.op, (ast.Not, ast.USub)))
    if isinstance(node, ast.BoolOp):
        return 1
    if isinstance(node, ast.Assign):  # of a local name: the mutant would only fail to find it
        return int(not isinstance(node.targets[0], (ast.Name, ast.Tuple)))
    return int(isinstance(node, (ast.Expr, ast.Break, ast.Delete, ast.Raise)))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _change(tree: ast.Module, node: ast.AST, variant: int) -> str:
    """Change a node of ``tree`` in place; what stands there afterwards."""
    if isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + (1, -1)[variant]  # type: ignore[operator]
    elif isinstance(node, ast.Compare):
        node.ops = [COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and variant == 0 and type(node.op) in ARITHMETIC:
        node.op = ARITHMETIC[type(node.op)]()
    elif isinstance(node, ast.Call):
        name = NAMES[_called(node)]
        if isinstance(node.func, ast.Attribute):
            node.func.attr = name
        elif isinstance(node.func, ast.Name):
            node.func.id = name
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        _replace(tree, node, node.operand)
        return ast.unparse(node.operand)
    else:
        _replace(tree, node, ast.Pass())
        return "pass"
    return ast.unparse(node)


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                setattr(parent, name, [new if item is old else item for item in value])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-27:]}"
