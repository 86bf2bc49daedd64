"""``pagebrain demo``: generates several stories at once with the bundled model, streams one, and shows the blocks of all.

The data come from an observer of the engine, which gets the :class:`~pagebrain.engine.trace.StepTrace` of every step.
"""

import argparse
import os
import re
import shutil
import sys
import time
from typing import TYPE_CHECKING

from pagebrain.cli.generate import started
from pagebrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pagebrain.config import PageBrainConfig
    from pagebrain.engine.trace import StepTrace

MAX_STORIES = 6
"""The number of colours in a terminal; story 0 is called A."""

POOL_BLOCKS = 64
"""Blocks of the demo's pool. A cache that reserves 1024 tokens for a sequence would fill it with one sequence."""

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT", help="how the stories begin")
    parser.add_argument("--stories", type=int, default=4, metavar="N", help="stories generated at once, 1 to 6 (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=240, metavar="N", help="longest story (default: 240)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 always takes the best token (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="another number gives other stories (default: 7)")


def run(args: argparse.Namespace) -> int:
    """Generate and stream the first story, then show the cache at the end of that story."""
    if not 1 <= args.stories <= MAX_STORIES:
        raise ConfigError(f"--stories must be between 1 and {MAX_STORIES}, got {args.stories}")

    # For so small a model, threads that spin while they wait slow down a machine that does other work too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    from rich.console import Console

    from pagebrain.llm import LLM
    from pagebrain.sampling_params import SamplingParams

    llm = LLM(seed=args.seed, num_blocks=POOL_BLOCKS)
    recorder = Recorder()
    llm.engine.observers.append(recorder)
    params = SamplingParams(n=args.stories, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    width = min(WIDTH, shutil.get_terminal_size().columns)
    writer = WordWrap(width - 1)  # one column for the space after the last word
    writer.write(args.prompt)
    began = time.monotonic()
    with started(llm, args.prompt, params) as deltas:
        for delta in deltas:
            if delta.index == 0:
                writer.write(delta.text)
    elapsed_s = time.monotonic() - began
    writer.end()
    Console(width=width, highlight=False).print(summary(recorder, llm.config, elapsed_s))
    return 0


class Recorder:
    """An observer that keeps the data of the demo.

    ``last`` is the last step that computed the first story. ``fullest`` is the step with the most blocks in use among those
    that computed it. ``story_of`` maps sequence ids to stories.
    """

    def __init__(self) -> None:
        self.num_generated = 0
        self.story_of: dict[int, int] = {}
        self.last: StepTrace | None = None
        self.fullest: StepTrace | None = None
        self.context_len = 0

    def __call__(self, trace: "StepTrace") -> None:
        for row in trace.rows:
            self.num_generated += row.samples
            self.story_of[row.seq_id] = row.sample_index
            if row.sample_index == 0:
                self.last, self.context_len = trace, row.start + row.num_tokens
                if self.fullest is None or len(trace.free_blocks) < len(self.fullest.free_blocks):
                    self.fullest = trace


class WordWrap:
    """Writes streamed text to standard output, with line breaks between words."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = 0
        self._word = ""

    def write(self, text: str) -> None:
        """Print all complete words. The last one may be incomplete."""
        *complete, self._word = re.split(r"(?<=\s)(?=\S)", self._word + text)
        for word in complete:
            self._print(word)
        sys.stdout.flush()

    def end(self) -> None:
        """Print the last word and a blank line."""
        self._print(self._word)
        print("\n", flush=True)
        self._word, self.column = "", 0

    def _print(self, word: str) -> None:
        if self.column and self.column + len(word.rstrip()) > self.width:
            print()
            self.column = 0
        print(word, end="")
        self.column = len(word) + self.column if "\n" not in word else len(word.rpartition("\n")[2])


def summary(recorder: Recorder, config: "PageBrainConfig", elapsed_s: float) -> "RenderableType":
    """The panel: speed, blocks against a reservation, the first story's block table, the pool."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    from pagebrain.viz import terminal

    assert recorder.last is not None and recorder.fullest is not None and config.max_model_len is not None
    first_story = next(seq_id for seq_id, story in recorder.story_of.items() if story == 0)
    table = recorder.last.block_tables[first_story]
    reserved = config.blocks_for(config.max_model_len)
    saved = 1 - len(table) / reserved
    reached, longest = recorder.context_len, config.max_model_len
    count = len(recorder.story_of)
    stories = f"{count} stories at once" if count > 1 else "one story"
    speed = Text(f"{recorder.num_generated} tokens in {elapsed_s:.1f} s: ")
    speed.append(f"{recorder.num_generated / elapsed_s:,.0f} tokens/s", style="bold").append(f", {stories}")
    fullest = recorder.fullest
    in_use = f"{fullest.num_blocks - len(fullest.free_blocks)} of {fullest.num_blocks} blocks in use"
    parts: list[RenderableType] = [
        speed,
        Text(),
        Text(f"Story A ended at {reached} cached tokens; the model could have gone on to {longest}."),
        terminal.reservation_bars(len(table), reserved, config.block_bytes),
        Text(f"{saved:.0%} less, in blocks of {config.block_size} tokens taken when the story needs them."),
        Text(),
        terminal.block_table(table, "Block table of story A: it took any block that was free."),
        Text(),
        terminal.pool_map(
            fullest,
            number_of=recorder.story_of.__getitem__,
            title=f"The pool when it was fullest, {in_use} (. is free):",
        ),
    ]
    return Panel(Group(*parts), title="PagedAttention", title_align="left", padding=(0, 1))
