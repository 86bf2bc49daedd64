"""``python -m chapters try``: a learner's part at work, in the real engine where it is a part of one, or with clients."""

import argparse
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console, Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from chapters.course.catalog import Chapter, CourseError, find_chapter
from chapters.course.cli import NOT_PASSED, add_work_argument
from chapters.course.failures import explain
from chapters.course.grading import check_file
from chapters.course.recorded_runs import INTERPRETED, PROMPTS, Record, run_chapter, run_engine
from chapters.course.visiting_clients import Visits, serve_visits
from chapters.course.workspace import OwnChapters, load_file, own_chapters, own_file, shown, work_folder
from pagebrain import LLM, PageBrainConfig
from pagebrain.models.loading import load_model
from pagebrain.viz import terminal
from pagebrain.viz.state import letter

PARTS = {
    "02": ("block_manager", "BlockManager"),
    "03": ("attention", "paged_attention"),
    "04": ("scheduler", "Scheduler"),
    "06": ("attention", "paged_attention"),
    "08": ("block_manager", "BlockManager"),
}
"""Chapter -> the engine's part that it can stand for, and its name there. Others run their own ``generate``."""

_SLOW = """\
There is no GPU here: Triton's interpreter runs the kernels, some hundred times slower. First {first} tokens of one story,
then {then} of each. --max-new-tokens asks for more."""

SETTINGS: dict[str, Any] = {"block_size": 8, "num_blocks": 32, "max_num_seqs": 4}
"""A small pool, in which blocks run out, so that there is something to see."""

SERVERS = ("05",)
"""Chapters whose subject is clients that come and go."""


_FEW = 8
_FIRST = 2  # tokens, before more are asked for of an interpreter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``try``."""
    parser.add_argument("chapter", metavar="CHAPTER", help="such as 02")
    parser.add_argument("--file", metavar="PATH", help="take this file (default: the chapter's file in work/)")
    parser.add_argument("--mine", action="store_true", help="import earlier chapters from your files, where you have them")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="how a story begins; repeatable (default: four)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"longest story (default: 60; {_FEW} where kernels are interpreted)"
    )
    add_work_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Generate with the learner's part and show what it did. The exit status is 0 if the tokens are the engine's own."""
    chapter = find_chapter(args.chapter)
    work = work_folder(args.work)
    path = Path(args.file).absolute() if args.file else own_file(chapter, work)
    console = Console(highlight=False)
    console.print(Text(f"Trying {check_file(chapter, path)}"), soft_wrap=True)
    if own := own_chapters(work, chapter, all_of_them=args.mine):
        console.print(Text(f"Earlier chapters of yours: {', '.join(map(shown, own.values()))}"), soft_wrap=True)
        OwnChapters(own).install()
    is_interpreted = chapter.number in INTERPRETED and not torch.cuda.is_available()
    max_new_tokens = (_FEW if is_interpreted else 60) if args.max_new_tokens is None else args.max_new_tokens
    if is_interpreted:
        console.print(Text(_SLOW.format(first=min(_FIRST, max_new_tokens), then=max_new_tokens)), soft_wrap=True)
    expected_by = LLM(**SETTINGS)
    tokenizer = expected_by.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(text) for text in args.prompt or PROMPTS[:4]]
    if not all(prompts):
        raise CourseError("a story begins with at least one token: --prompt is empty")
    expected = run_engine(expected_by, prompts, max_new_tokens)
    try:
        module = load_file(path, f"tried_{chapter.name}")
        problem = ""
        if is_interpreted:
            record = _run(chapter, module, prompts[:1], min(_FIRST, max_new_tokens))
            problem = _problem(record.answers, [expected.answers[0][:_FIRST]])
            console.print(Text(f"{record.num_tokens} tokens in {record.seconds:.1f} s"))
        if not problem:
            record = _run(chapter, module, prompts, max_new_tokens)
            problem = _problem(record.answers, expected.answers)
        visits = None
        if chapter.number in SERVERS and not problem:
            visits = serve_visits(module, load_model(PageBrainConfig()), prompts, max_new_tokens, **SETTINGS)
            problem = visits.problem(expected.answers)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # all that the learner's file can raise, sys.exit included
        return _report(error, {path, *own.values()})
    _show(console, record, prompts, tokenizer, visits)
    verdict = problem or "Every token is the one that the engine gives by itself."
    console.print(Text(verdict, style="red" if problem else "green"), soft_wrap=True)
    return NOT_PASSED if problem else 0


def _run(chapter: Chapter, module: ModuleType, prompts: list[list[int]], max_new_tokens: int) -> Record:
    """The learner's part in the engine, or their ``generate``."""
    if chapter.number in PARTS:
        part, name = PARTS[chapter.number]
        if not hasattr(module, name):
            raise CourseError(f"the file has no {name}")
        return run_engine(LLM(parts={part: getattr(module, name)}, **SETTINGS), prompts, max_new_tokens)
    return run_chapter(module.generate, load_model(PageBrainConfig()), prompts, max_new_tokens)


def _problem(answers: Any, expected: list[list[int]]) -> str:
    """Where the answers first depart from the engine's, empty if nowhere."""
    if not isinstance(answers, list) or len(answers) != len(expected):
        return f"{len(expected)} prompts need as many answers, got {answers!r:.200}"
    for index, (mine, theirs) in enumerate(zip(answers, expected, strict=True)):
        for position, (got, wanted) in enumerate(zip(mine, theirs)):
            if got != wanted:
                return f"Story {letter(index)} departs at output token {position}: got {got}, expected {wanted}."
        if len(mine) != len(theirs):
            return f"Story {letter(index)} has {len(mine)} tokens, the engine's has {len(theirs)}."
    return ""


def _report(error: BaseException, own: set[Path]) -> int:
    """One line about what the learner's code raised; the engine wraps it, so look for the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, CourseError):
        raise error
    kind, message, where = explain(error, own)
    lead = "not done yet: " if kind == "todo" else ""
    place = f" (in your file, {where})" if where and kind != "todo" else ""
    print(f"chapters: {lead}{message}{place}", file=sys.stderr)
    if not place and kind != "todo":
        print("".join(traceback.format_tb(error.__traceback__)[-1:]).strip(), file=sys.stderr)
    return NOT_PASSED


def _show(
    console: Console, record: Record, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, visits: Visits | None
) -> None:
    """The stories; then the clients that came and went, or the fullest step and which sequences ran when."""
    for index, (prompt, answer) in enumerate(zip(prompts, record.answers)):
        text = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
        console.print(Text(f"\n{letter(index)}  ", style=f"bold {terminal.colour(index)}").append(str(text)))
    parts: list[Any] = [Text()]
    if visits is not None:
        parts += [visits.shown(), Text()]
    elif record.traces:
        fullest = max(record.traces, key=lambda trace: trace.num_blocks - len(trace.free_blocks))
        parts += [terminal.pool_map(fullest), Text(), terminal.block_tables(fullest), Text()]
        parts += [terminal.timeline(record.traces), Text()]
    steps = f", {len(record.traces)} steps" if record.traces else ""
    what = "" if visits is None else "The stories above, all asked for together: "
    parts.append(Text(f"{what}{record.num_tokens} tokens in {record.seconds:.2f} s{steps}"))
    console.print(Group(*parts))
