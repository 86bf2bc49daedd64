"""``python -m chapters ladder``: every stage on the same work, from recomputing everything to the engine."""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GPT2LMHeadModel

from chapters import TodoError
from chapters.course.catalog import CourseError, find_chapters
from chapters.course.cli import NOT_PASSED, add_work_argument
from chapters.course.failures import explain
from chapters.course.recorded_runs import INTERPRETED, PROMPTS, Record, room_for_all, run_chapter, run_engine
from chapters.course.workspace import OwnChapters, own_chapters, shown, work_folder, write_file
from pagebrain import LLM, PageBrainConfig
from pagebrain.bench.machine_facts import versions
from pagebrain.bench.workload import LengthRange, make_workload
from pagebrain.models.loading import load_model, load_tokenizer

ENGINE = "engine"
# Chapters in INTERPRETED are left out without a GPU: the time of an interpreter would mean nothing.

_WARMUP_TOKENS = 8
"""New tokens of a chapter's run before the timed one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ladder``."""
    parser.add_argument("--model", metavar="NAME", help="hub name or folder of a GPT-2 (default: the bundled story model)")
    parser.add_argument("--load-format", default="auto", metavar="FORMAT", help="auto, or dummy for random weights")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="auto, float64, float32, bfloat16 or float16")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", metavar="FILE", help="a prompt on each line (default: eight beginnings of stories)")
    prompts.add_argument("--requests", type=int, metavar="N", help="this many prompts of random tokens instead")
    parser.add_argument("--input-len", default="64:256", metavar="LOW:HIGH", help="their lengths (default: 64:256)")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="with --requests: N tokens before each")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens of an answer (default: 64)")
    parser.add_argument("--mine", action="store_true", help="take your own files of chapters, where you have them")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", metavar="FILE", help="draw the staircase, as .png, .svg or .pdf (needs matplotlib)")
    parser.add_argument("--from-json", metavar="FILE", help="measure nothing: show and draw what --json wrote elsewhere")
    add_work_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    staircase = _staircase() if args.plot else None  # a missing package should be told before anything is measured
    console = Console(highlight=False)
    failed: list[str] = []
    if args.from_json:
        report = json.loads(Path(args.from_json).read_text(encoding="utf-8"))
    else:
        report, failed = _measure(args, console)
    console.print(_table(report["stages"]))
    if not args.from_json:
        _compare_answers(report, console)
    if args.json:
        write_file(Path(args.json).absolute(), json.dumps(report, indent=2) + "\n")
    if staircase is not None:
        staircase(report["stages"], note=describe(report)).save(Path(args.plot))
    return NOT_PASSED if failed else 0


def _measure(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[str]]:
    """The report, and the chapters of this repository that failed; a learner's that fail are told and left out."""
    own = own_chapters(work_folder(args.work), None, all_of_them=args.mine)
    if own:
        OwnChapters(own).install()
    settings = PageBrainConfig(model=args.model, load_format=args.load_format, device=args.device, dtype=args.dtype)
    model = load_model(settings)
    prompts = _prompts(args, settings, model)
    longest = max(map(len, prompts)) + args.max_new_tokens
    if args.max_new_tokens < 1 or longest > model.config.n_positions:
        raise CourseError(
            f"--max-new-tokens must be at least 1, and {longest} tokens fit into {model.config.n_positions} positions"
        )
    report: dict[str, Any] = {
        "date": f"{datetime.now():%Y-%m-%d}",
        "command": shlex.join(["python", "-m", "chapters", *sys.argv[1:]]),
        "model": args.model or "bundled",
        "load_format": args.load_format,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(str(model.device)),
        "prompt_lens": [*map(len, prompts)],
        "max_new_tokens": args.max_new_tokens,
    }
    console.print(Text(_work(report)), soft_wrap=True)
    if own:
        console.print(Text(f"Yours: {', '.join(map(shown, own.values()))}"), soft_wrap=True)
    if model.device.type != "cuda":
        skipped = " ".join(chapter.name[2:] for chapter in find_chapters() if chapter.number in INTERPRETED)
        console.print(Text(f"{skipped}: left out, without a GPU its kernels are interpreted", style="yellow"))
    rows, failed = [], []
    for stage in _stages(model, settings, prompts, args.max_new_tokens):
        try:
            rows.append(_row(stage.name, stage.warm_up(), stage.run(), model))
        except TodoError:
            console.print(Text(f"{stage.name}: left out, it is not done yet", style="yellow"))
        except Exception as error:
            _, message, where = explain(error, own.values())
            failed += [] if own else [stage.name]
            text = f"{stage.name}: left out, it fails: {message} {where}".rstrip()
            console.print(Text(text, style="red"), soft_wrap=True)
    if not rows:
        raise CourseError("nothing could be measured")
    return report | {"stages": rows}, failed


def _compare_answers(report: dict[str, Any], console: Console) -> None:
    """Name the stages that give other tokens than the last, and keep only how many answers are the same."""
    rows = report["stages"]
    last = rows[-1]["answers"]
    for row in rows:
        answers = row.pop("answers")
        row["equal_answers"] = sum(mine == theirs for mine, theirs in zip(answers, last))
    others = [f"{row['stage']} ({row['equal_answers']} of {len(last)} the same)" for row in rows]
    others = [text for row, text in zip(rows, others) if row["equal_answers"] < len(last)]
    if others and report["dtype"] in ("bfloat16", "float16"):
        text = (
            f"In {report['dtype']} sums round differently, and with them the choice between tokens that are nearly as good."
        )
        console.print(Text(f"{text} Other tokens than the {rows[-1]['stage']}'s: {', '.join(others)}."), soft_wrap=True)
    elif others:
        text = f"These give other tokens than the {rows[-1]['stage']}: {', '.join(others)}."
        console.print(Text(text, style="bold red"), soft_wrap=True)
    elif len(rows) > 1:
        console.print(Text("Every stage gives the same tokens.", style="green"))


def _work(report: Mapping[str, Any]) -> str:
    lens = report["prompt_lens"]
    return (
        f"{len(lens)} prompts of {min(lens)} to {max(lens)} tokens, up to {report['max_new_tokens']} new ones each, "
        f"{report['dtype']} on {report['device']}"
    )


def describe(report: Mapping[str, Any]) -> str:
    """What was measured, where and when, in a line for the picture."""
    lens, machine = report["prompt_lens"], report["versions"]
    names = {"bundled": "story model, 1M parameters", "openai-community/gpt2": "GPT-2 124M", "gpt2": "GPT-2 124M"}
    weights = ", random weights" if report.get("load_format") == "dummy" else ""
    return (
        f"{names.get(report['model'], report['model'])}{weights}, {report['dtype']}; {len(lens)} requests at once, "
        f"{min(lens)} to {max(lens)} tokens in, {report['max_new_tokens']} out; {machine.get('gpu', machine['processor'])}, "
        f"{report['date']}"
    )


def _prompts(args: argparse.Namespace, settings: PageBrainConfig, model: GPT2LMHeadModel) -> list[list[int]]:
    """Token ids of the prompts: random ones, or those of a file."""
    if args.shared_prefix < 0:
        raise CourseError(f"--shared-prefix must be at least 0, got {args.shared_prefix}")
    if args.requests is not None:
        if args.requests < 1:
            raise CourseError(f"--requests must be at least 1, got {args.requests}")
        lengths = LengthRange.parse("--input-len", args.input_len)
        made = make_workload(args.requests, lengths, LengthRange(1, 1), model.config.vocab_size, seed=0)
        common = [token % model.config.vocab_size for token in range(args.shared_prefix)]
        return [[*common, *request.prompt_token_ids] for request in made]
    if args.shared_prefix:
        raise CourseError("--shared-prefix needs --requests N: it goes before prompts of random tokens")
    tokenizer = load_tokenizer(settings)
    if tokenizer is None:
        raise CourseError("this model has no tokenizer: use --requests N for prompts of random tokens")
    lines = list(PROMPTS) if args.prompts is None else Path(args.prompts).read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise CourseError(f"{args.prompts} holds no prompt: write one on each line")
    return [tokenizer.encode(text) for text in prompts]


@dataclass(frozen=True)
class _Stage:
    """One row of the table. ``warm_up`` comes before ``run``, because a first run pays for what later ones reuse."""

    name: str
    warm_up: Callable[[], Record]
    run: Callable[[], Record]


def _stages(
    model: GPT2LMHeadModel, settings: PageBrainConfig, prompts: list[list[int]], max_new_tokens: int
) -> Sequence[_Stage]:
    """The chapters, and the engine with the same weights in its own layout."""
    stages = []
    config = room_for_all(model, prompts, max_new_tokens)
    for chapter in find_chapters():
        if chapter.number in INTERPRETED and model.device.type != "cuda":
            continue
        try:
            generate = getattr(importlib.import_module(f"chapters.{chapter.name}"), "generate", None)
        except (Exception, SystemExit) as error:  # the learner's own file, or one that imports it
            text = f"chapter {chapter.number} cannot be imported: {type(error).__name__}: {error}"
            raise CourseError(f"{text}; python -m chapters check {chapter.number} says where") from error
        if generate is None:
            continue
        runner = partial(run_chapter, generate, model, prompts, config=config)
        warm_up = partial(runner, max_new_tokens=min(_WARMUP_TOKENS, max_new_tokens))
        stages.append(_Stage(chapter.name[2:], warm_up, partial(runner, max_new_tokens=max_new_tokens)))
    engines: list[LLM] = []

    def watched() -> Record:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the chapters held: the engine takes what is free
        names = ("load_format", "device", "dtype")
        engines.append(LLM(settings.model, **{name: getattr(settings, name) for name in names}))
        return run_engine(engines[0], prompts, max_new_tokens)

    stages.append(_Stage(ENGINE, watched, lambda: run_engine(engines[0], prompts, max_new_tokens, watch=False)))
    return stages


def _row(stage: str, before: Record, record: Record, model: GPT2LMHeadModel) -> dict[str, Any]:
    """The numbers of a stage, under the names that the picture reads. The fullest cache may be that of the warm-up."""
    config = model.config
    token_bytes = 2 * config.n_layer * config.n_embd * model.dtype.itemsize  # K and V
    per_token = record.seconds_per_token
    return {
        "stage": stage,
        "tokens": record.num_tokens,
        "seconds": record.seconds,
        "tokens_per_s": record.num_tokens / record.seconds,
        "ms_per_token": None if per_token is None else 1000 * per_token,
        "kv_bytes": max(before.peak_cache_tokens, record.peak_cache_tokens) * token_bytes,
        "answers": record.answers,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("Stage", no_wrap=True)
    for column in ("tokens/s", "ms per token", "KV cache (KiB)"):
        table.add_column(column, justify="right")
    for row in rows:
        per_token = "-" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}"
        table.add_row(row["stage"], f"{row['tokens_per_s']:,.0f}", per_token, f"{row['kv_bytes'] / 1024:,.0f}")
    return table


def _staircase() -> Callable[..., Any]:
    from pagebrain.viz import staircase

    return staircase
