"""``python -m chapters ladder``: every stage on the same work, from recomputing everything to the engine."""

import argparse
import importlib
import inspect
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GPT2LMHeadModel

from chapters import TodoError
from chapters.course.catalog import find_chapters
from chapters.course.cli import add_work_argument
from chapters.course.errors import CourseError
from chapters.course.failures import explain
from chapters.course.loading import OwnChapters
from chapters.course.stages import own_chapters
from chapters.course.workload import PROMPTS, Record, run_chapter, run_engine
from chapters.course.workspace import shown, work_folder, write_file
from pagebrain import LLM, PageBrainConfig
from pagebrain.bench.offline import versions
from pagebrain.loading import load_model, load_tokenizer

ENGINE = "engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ladder``."""
    parser.add_argument("--model", metavar="NAME", help="hub name or folder of a GPT-2 (default: the bundled story model)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="auto, float64, float32, bfloat16 or float16")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on each line (default: eight beginnings of stories)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens of an answer (default: 64)")
    parser.add_argument("--mine", action="store_true", help="take your own files of chapters, where you have them")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", metavar="FILE", help="draw the staircase, as .png, .svg or .pdf (needs matplotlib)")
    add_work_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    staircase = _staircase() if args.plot else None  # a missing package should be told before anything is measured
    own = own_chapters(work_folder(args.work), None, all_of_them=args.mine)
    if own:
        OwnChapters(own).install()
    settings = PageBrainConfig(model=args.model, device=args.device, dtype=args.dtype)
    model, tokenizer = load_model(settings), load_tokenizer(settings)
    if tokenizer is None:
        raise CourseError("this model has no tokenizer")
    prompts = [tokenizer.encode(text) for text in _prompts(args.prompts)]
    longest = max(map(len, prompts)) + args.max_new_tokens
    if args.max_new_tokens < 1 or longest > model.config.n_positions:
        raise CourseError(
            f"--max-new-tokens must be at least 1, and {longest} tokens fit into {model.config.n_positions} positions"
        )
    console = Console(highlight=False)
    workload = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    workload += f", up to {args.max_new_tokens} new ones each, {model.dtype} on {model.device}"
    console.print(Text(workload), soft_wrap=True)
    if own:
        console.print(Text(f"Yours: {', '.join(map(shown, own.values()))}"), soft_wrap=True)
    rows = []
    for stage, runner in _stages(model, prompts, args.max_new_tokens).items():
        try:
            runner()  # a warm-up: the first run of anything pays for what later ones reuse
            record = runner()
        except TodoError:
            console.print(Text(f"{stage}: left out, it is not done yet", style="yellow"))
            continue
        except Exception as error:
            if not own:
                raise
            _, message, where = explain(error, own.values())
            console.print(Text(f"{stage}: left out, it fails: {message} {where}".rstrip(), style="red"), soft_wrap=True)
            continue
        rows.append(_row(stage, record, model))
    if not rows:
        raise CourseError("nothing could be measured")
    console.print(_table(rows))
    others = [row["stage"] for row in rows if row["answers"] != rows[-1]["answers"]]
    verdict = f"These give other tokens than the {rows[-1]['stage']}: {', '.join(others)}." if others else ""
    if len(rows) > 1:
        console.print(Text(verdict or "Every stage gives the same tokens.", style="bold red" if others else "green"))
    for row in rows:
        del row["answers"]
    if args.json:
        report: dict[str, Any] = {"date": f"{datetime.now():%Y-%m-%d}", "model": args.model or "bundled"}
        report |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        report |= {"threads": torch.get_num_threads(), "versions": versions(str(model.device))}
        report |= {"prompt_lens": [*map(len, prompts)], "max_new_tokens": args.max_new_tokens, "stages": rows}
        write_file(Path(args.json).absolute(), json.dumps(report, indent=2) + "\n")
    if staircase is not None:
        staircase(rows).save(Path(args.plot))
    return 0


def _prompts(name: str | None) -> list[str]:
    lines = list(PROMPTS) if name is None else Path(name).read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise CourseError(f"{name} holds no prompt: write one on each line")
    return prompts


def _stages(model: GPT2LMHeadModel, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Callable[[], Record]]:
    """Each stage's name and a function that runs it once."""
    stages: dict[str, Callable[[], Record]] = {}
    for chapter in find_chapters():
        try:
            generate = getattr(importlib.import_module(f"chapters.{chapter.name}"), "generate", None)
        except (Exception, SystemExit) as error:  # the learner's own file, or one that imports it
            text = f"chapter {chapter.number} cannot be imported: {type(error).__name__}: {error}"
            raise CourseError(f"{text}; python -m chapters check {chapter.number} says where") from error
        if generate is None:
            continue
        steps = "on_step" in inspect.signature(generate).parameters

        def run_it(generate: Any = generate, steps: bool = steps) -> Record:
            return run_chapter(generate, model, prompts, max_new_tokens, steps=steps)

        stages[chapter.name[2:]] = run_it
    llm = LLM(model)
    stages[ENGINE] = lambda: run_engine(llm, prompts, max_new_tokens)
    return stages


def _row(stage: str, record: Record, model: GPT2LMHeadModel) -> dict[str, Any]:
    """The numbers of a stage, under the names that the picture reads."""
    config = model.config
    token_bytes = 2 * config.n_layer * config.n_embd * model.dtype.itemsize  # K and V
    per_token = record.seconds_per_token
    return {
        "stage": stage,
        "tokens": record.num_tokens,
        "seconds": record.seconds,
        "tokens_per_s": record.num_tokens / record.seconds,
        "ms_per_token": None if per_token is None else 1000 * per_token,
        "kv_bytes": record.peak_cache_tokens * token_bytes,
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
