"""Schedulers for servers under test, named on their command lines: ``--part scheduler=tests.support.served_parts:Slow``.

With them a test decides how long an answer takes, when the engine stands still, and what fails, instead of racing it.
"""

import os
import time
from pathlib import Path

from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import Sequence, SequenceGroup

STEP_S = 0.02
"""How long a step of :class:`Slow` takes, at least."""

HOLD = "PAGEBRAIN_TEST_HOLD"
"""Environment variable that names the file of :class:`Held`."""

HELD_AFTER = 5
"""Tokens of an answer after which :class:`Held` looks for its file."""

REFUSED, FATAL = 1701, 1702
"""Prompts that begin so are those over which :class:`Failing` fails: when they are added, or at every step."""


class Slow(Scheduler):
    """Steps take so long that what happens within a few of them is not a matter of luck."""

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step, late."""
        time.sleep(STEP_S)
        return super().schedule()


class Held(Scheduler):
    """Stands still when an answer has a few tokens, for as long as a file exists."""

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step as soon as that is allowed."""
        hold = Path(os.environ[HOLD])
        while any(seq.num_tokens - seq.num_prompt_tokens >= HELD_AFTER for seq in self.running) and hold.exists():
            time.sleep(0.005)
        return super().schedule()


class Failing(Scheduler):
    """Fails over some requests, and says their tokens when it does."""

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Of a request that is refused, the first sample is in the queue when the second one fails."""
        if seq.token_ids[0] == REFUSED and seq.sample_index > 0:
            raise RuntimeError(f"no room for {seq.token_ids}")
        super().add(seq)

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step."""
        for seq in self.running:
            if seq.token_ids[0] == FATAL:
                raise RuntimeError(f"cannot go on with {seq.token_ids}")
        return super().schedule()
