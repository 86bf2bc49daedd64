"""The command line: ``pagebrain serve``, ``generate``, ``demo``, ``doctor`` and ``bench``, one module each.

Options without a command, as in ``pagebrain --model openai-community/gpt2``, are options of ``serve``.

The exit status is 2 for a mistake in the input, 1 for a step that failed, 130 when interrupted.
torch is imported only when a command needs it.
"""

from collections.abc import Sequence

from pagebrain import __version__
from pagebrain.cli.frame import CommandLine
from pagebrain.errors import BlockError, BlockTableError, IntegrityError, PageBrainError, StepError

COMMANDS = {
    "serve": "serve a model over HTTP, with OpenAI's API",
    "generate": "continue a prompt and print the text as it is generated",
    "demo": "stream a story from the bundled model, and show the blocks of its K and V",
    "doctor": "check this machine for what the engine needs, with advice for each lack",
    "bench": "measure throughput and latency",
}

_EXAMPLES = """\
examples:
  pagebrain demo
  pagebrain generate "Once upon a time" --max-tokens 60 --temperature 0.8 --seed 1
  echo "Once upon a time" | pagebrain generate --json
  pagebrain generate "Hello" --model openai-community/gpt2
  pagebrain serve --model openai-community/gpt2 --port 8000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    line = CommandLine(
        name="pagebrain",
        prog="pagebrain",
        description="Serve GPT-2 with PagedAttention, and see how it works.",
        epilog=_EXAMPLES,
        commands=COMMANDS,
        module="pagebrain.cli.{}",
        mistakes=(PageBrainError,),
        internal=(StepError, IntegrityError, BlockError, BlockTableError),  # errors of a part, not of the input
        version=f"pagebrain {__version__}",
        advice=", then pagebrain doctor",
        default="serve",
        address_space_bytes=1_250_000_000,
    )
    return line.main(argv)
