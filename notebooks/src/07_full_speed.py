# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chapter 07: full speed
#
# The engine of chapter 04 decides well. On a GPU it is slow all the same, even with the kernels of chapter 06, and what is slow is not
# the GPU. This chapter looks at where the time of a step goes, and takes Python out of its way: without a single faster
# kernel, a step becomes several times shorter.
#
# **You need:** chapter 04. You need no GPU: what a GPU would do is recorded, or played on the CPU by something that has the same
# habits. **Time:** about seven hours with the exercises.
#
# *You will be able to* say what sets the pace of a decode step, keep the state of sequences in fixed places on the GPU, write a step
# that can be captured as a CUDA graph and replayed, pad batches without a branch, and launch a step before the last one is read,
# with everything that follows from that.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 07` passes.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from chapters.aids import capture
from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
ch07 = load_stage("07")
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
CPU = torch.device("cpu")

# %% [markdown]
# ## The problem, measured
#
# A decode step is a list of *launches*. The CPU says "add these, then multiply those", one call for each kernel, and the GPU works
# through the list in order. The calls do not wait for the kernels: the CPU may be far ahead. Only whoever wants to *see* a
# number, `tokens.tolist()` say, has to wait.
#
# What does that look like? Below is a decode step of GPT-2 124M for one sequence, drawn from a recording on one machine. The upper row is
# the CPU, the lower one is the GPU. On a GPU this cell records anew, in less than a minute; elsewhere it reads what was recorded.

# %%
RECORDED = Path("../docs/performance/timeline.json")

report = None
if torch.cuda.is_available():
    from chapters.aids import timeline

    report = timeline.record(command="recorded in this notebook")
elif RECORDED.is_file():
    from chapters.aids import timeline

    report = json.loads(RECORDED.read_text(encoding="utf-8"))
if report is None:
    print("skipped: there is no GPU, and this copy has no docs/performance/timeline.json")
else:
    versions = report["versions"]
    print(f"{report['command']}, on {report['date']}")
    print(f"{versions['gpu']}, torch {versions['torch']}, CUDA {versions['cuda']}", end="")
    print(f"; {report['model']}, {report['dtype']}")

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    viz.show(timeline.draw(report, 1, ["eager"]))


# %% [markdown]
# The CPU is busy all the time, and what it does is launch. The GPU has a few microseconds of work, and waits for the next call.
# (Each call goes through layers of Python and C++: a module's `forward`, the dispatcher, the choice of a kernel, the driver.)
#
# Two things about how this is drawn. The steps between the dotted lines are *longer than the title says*: the picture was recorded under the
# profiler, which notes every call and so slows the CPU down, and the title's time was taken without it. And most kernels are thinner than a pixel
# here, so the blue of a line is not to scale: the table says how long the GPU was busy.
#
# In numbers, with the length of a step without the profiler and under it:


# %%
def show_runs(report, ways):
    print(
        "batch  way    ms a step   profiled   launches   kernels   GPU busy, ms   of the profiled step"
    )
    for run in report["runs"]:
        if run["way"] in ways:
            share = run["gpu_busy_ms"] / run["profiled_step_ms"]["median"]
            print(
                f"{run['batch']:5d}  {run['way']:5s}  {run['step_ms']['median']:9.2f}  "
                f"{run['profiled_step_ms']['median']:9.2f}  "
                f"{run['launches_per_step']:9.0f}  {run['kernels_per_step']:8.0f}  "
                f"{run['gpu_busy_ms']:13.2f}  {share:20.0%}"
            )


if report is None:
    print("skipped: nothing was recorded")
else:
    show_runs(report, ["eager"])

# %% [markdown]
# How many launches there are does not depend on the machine, and hardly on the size of the model: it is the number of operations that the
# code asks for. We can count them on any CPU. `Recording`, about which more below, writes down every operation that PyTorch is asked
# to compute. Here is a decode step of a tiny model with as many layers as GPT-2 124M:

# %% tags=["nbval-check-output"]
shape = {"n_embd": 24, "n_head": 2, "n_layer": 12, "vocab_size": 97, "n_positions": 64}
torch.manual_seed(0)
tiny = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=None)).eval()
settings = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 4, "max_model_len": 40}
config = PageBrainConfig.for_model(tiny, **settings)
engine = ch07.Engine(tiny, config, use_graphs=False)
engine.add_request([1, 2, 3], 8)
engine.step()  # the prompt
with capture.Recording() as recording:
    engine.executor.steps[1]()
computing = [
    func
    for func, *_ in recording.operations
    if not func.is_view and "detach" not in str(func)
]
print(f"{len(computing)} operations in one decode step of {shape['n_layer']} layers")

# %% [markdown]
# > **Predict.** The batch grows from 1 sequence to 32. What happens to the number of launches, to the time that the CPU needs for
# > them, and to the tokens per second?

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    for run in report["runs"]:
        if run["way"] == "eager":
            per_s = 1e3 * run["batch"] / run["step_ms"]["median"]
            print(
                f"batch {run['batch']:2d}: {run['launches_per_step']:.0f} launches, "
                f"{run['host_ms']['launch']:.1f} ms launching, {per_s:,.0f} tokens/s"
            )

# %% [markdown]
# <details><summary><b>If you said that everything grows by a factor of 32</b></summary>
#
# Only the work of each kernel grows. The list of launches is nearly the same, a little longer where PyTorch splits one operation into two
# kernels. So the CPU needs about as long for 32 sequences as for one, and each step brings 32 tokens. (Milliseconds of a CPU that others
# use too are good for comparing ways at one batch size, not for small differences between two.)
#
# The 32 tokens for one list of launches are why batching helps even a slow host. It also means that one user alone waits for Python almost all
# of the time.
# </details>
#
# ## Four habits
#
# The rest of the step is not free either. Chapter 04 makes its tensors anew at every step: token ids, positions, slots, block tables. Each
# is a copy from the host, and a copy out of ordinary memory makes the CPU wait until it is done. Four habits remove nearly all of
# this, and each of them makes the next one possible:
#
# 1. **Batch rows.** State lives on the GPU. Each running sequence has a fixed row there, and only what changed travels.
# 2. **A captured step.** All launches from embedding to sampled token are recorded once, as a *CUDA graph*, and replayed with one call.
# 3. **A dummy sequence.** There is one graph for each of a few batch sizes, the *buckets*. A smaller batch is padded, and nobody has to know.
# 4. **Launching ahead.** Step N+1 is launched before step N is read.
#
# ## 1. Batch rows
#
# What does a decode step need to know of a sequence? Its newest token, the position of it, and where its K and V lie. Of these,
# token and position are what the *step before* produced: it may as well leave them where the next one looks for them. What only the host
# knows is the block table, and that changes once in `block_size` steps, by one number.

# %%
viz.show_source(ch07.BatchRows.__init__, ch07.BatchRows.send)

# %% [markdown]
# Two helpers of `chapters/aids/capture.py` carry numbers between host and GPU, and neither makes the host wait. `upload(numbers, device)` makes a tensor on the GPU,
# in one copy out of pinned memory; `Download(tensor)` starts a copy to the host, and only its `wait()` waits and returns the numbers.

# %% [markdown]
# Let three texts run, and note what travels to the rows in each step. Blocks have four slots. The second number is what chapter 04 makes
# for the same step: token ids, positions, slots, tables, lengths.


# %% tags=["nbval-check-output"]
def watch_rows(engine):
    """What ``send`` was given, a list of changes for each step."""
    sent, send = [[]], engine.executor.rows.send

    def watched(changes):
        sent[-1] += changes
        send(changes)

    engine.executor.rows.send = watched
    return sent


engine = ch07.Engine(tiny, config)
sent = watch_rows(engine)
for prompt in ([1, 2, 3], [7, 8, 9, 10, 11, 12], [40]):
    engine.add_request(prompt, 12)
print("step   numbers that travel   numbers that chapter 04 sends")
for step in range(9):
    group = engine.scheduler.schedule()
    tables = [len(engine.cache.block_table(entry.seq.seq_id)) for entry in group]
    anew = 3 * group.num_tokens + len(group) * (max(tables) + 2) + 1
    engine.launch(group)
    engine.read(engine.in_flight.popleft())
    print(f"{step:4d}   {len(sent[-1]):19d}   {anew:29d}")
    sent.append([])

# %% [markdown]
# Step 0 brings three new sequences: tokens, lengths, tables, and after the two prompts their new lengths. (The third prompt has one
# token. That is a decode.) From then on nothing travels but a block now and then. Here are the rows as they lie in memory. A row is taken by whoever needs one, and is not moved when
# others end; the last one is the dummy's, whose block is never given to anybody else.

# %% tags=["nbval-check-output"]
rows = engine.executor.rows
print("row   token   context   block table          held by")
for row in [*sorted(rows.row_of.values()), rows.dummy_row]:
    token, context, *blocks = rows.state[row, :6].tolist()
    holder = next((seq_id for seq_id, at in rows.row_of.items() if at == row), "the dummy")
    token = "any" if row == rows.dummy_row else str(token)
    print(f"{row:3d}   {token:>5s}   {context:7d}   {str(blocks):20s} {holder}")

# %% [markdown]
# There are twice as many rows as seats, and you will see below why.
#
# ## 2. A step that can be captured
#
# CUDA can record what is launched on a stream, and launch all of it again with one call. Such a recording is a *CUDA graph*. It has no Python
# in it, no dispatcher, and no choice of kernels: only kernels, and the addresses that they read and write. On a CPU we
# let `Recording` play its part. It writes down PyTorch's operations with their tensors, and computes them again on the same
# memory. `capture` makes the one or the other:

# %%
viz.show_source(ch07.capture)

# %% [markdown]
# What does "the same memory" mean for whoever writes the step? Three experiments. First, a buffer that is written to, against a name
# that is bound to something new:

# %% tags=["nbval-check-output"]
source, result = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64)
replay = capture.capture(lambda: result.copy_(source * 10), CPU)

source.copy_(torch.tensor([4, 5, 6]))  # into the memory that the recording knows
replay()
print("written into the buffer:", result.tolist())

source = torch.tensor([7, 8, 9])  # other memory, under the same name
replay()
print("bound to a new tensor:  ", result.tolist())

# %% [markdown]
# Second, a number of Python's. A recording holds the value that it had:

# %% tags=["nbval-check-output"]
source, length = torch.arange(5), 2
replay = capture.capture(lambda: result[:1].copy_(source[:length].sum()), CPU)
length = 5
replay()
print("the sum of the first 5 should be 10, and is", result[:1].tolist())

# %% [markdown]
# Third, a step that looks at a result. This cannot work at all: while a step is recorded nothing has been computed, so there is
# nothing to look at. CUDA refuses it, and so does `Recording`:

# %% tags=["nbval-check-output"]
for name, step in {
    "x.sum().item()": lambda: source.sum().item(),
    "if x.sum() > 3": lambda: 1 if source.sum() > 3 else 0,
    "x[x > 1]": lambda: source[source > 1],
}.items():
    try:
        capture.capture(step, CPU)
    except capture.CaptureError as error:
        print(f"{name:15s} {error}")

# %% [markdown]
# > **Predict.** Chapter 03's `paged_attention` walks over the pages `for page in range(pages of the longest context)`. Can a step that
# > calls it be captured?

# %% tags=["nbval-check-output"]
lengths, block_size = torch.tensor([9, 3]), 4


def walk():
    """The loop of ``paged_attention``, without what is computed in it."""
    longest = int(lengths.max())
    for page in range(math.ceil(longest / block_size)):
        lengths - page * block_size


try:
    capture.capture(walk, CPU)
except capture.CaptureError as error:
    print(error)

# %% [markdown]
# <details><summary><b>If you said yes, since the loop is plain Python</b></summary>
#
# The loop runs while it is recorded, and its number of turns becomes a part of the recording. To know it, the host has to read the longest
# length from the GPU: `int(lengths.max())` is what is refused here. (The whole function is refused even sooner, at a `repeat_interleave`.) Even if it
# did not (the host could count along), the recording would be right for contexts of that many pages only, and they grow.
# </details>
#
# So in a captured step every shape is fixed. This chapter gathers each row's whole table and masks what lies past its position. That
# reads more than it needs. A kernel, as in chapter 06, reads in its own loop how far its context goes, on the GPU, and its grid is the same
# for all lengths: the engine's graphs hold that.

# %%
viz.show_source(ch07.attend_rows)

# %% [markdown]
# With the rows of habit 1, such a step is short to describe: take the active rows, compute, write the token back where it was taken from.
# What differs from step to step is *in* the tensors: in `state`, and in `active_rows`, which says who takes part. That is exercise
# 7.3.
#
# ## 3. Buckets, and a sequence that is nobody's
#
# A graph is for one number of rows. To capture one for every number up to 256 would take long and hold much memory, so there are a few, the
# *buckets*, and a batch takes the smallest that holds it. What of the rows that are left over? They have to be *somebody's*: a row
# index is read, a token is embedded, K and V are written to a slot. One could tell each kernel how many rows count. There is a simpler
# way: a sequence that nobody asked for, in the last batch row, at position 0, with a block of its own. It is computed like any other, as often as
# one likes, and no kernel has to ask.

# %% tags=["nbval-check-output"]
engine = ch07.Engine(tiny, config)
rows = engine.executor.rows
print("buckets:", sorted(engine.executor.steps))
for names in ([3, 0, 5], [5]):
    bucket = ch07.bucket_for(len(names), sorted(engine.executor.steps))
    rows.activate(names, bucket)
    print(
        f"rows {names} in bucket {bucket}: active_rows = {rows.active_rows[:bucket].tolist()}"
    )

# %% [markdown]
# > **Predict.** Suppose that the step adds one to the context of *every* active row, the dummy's too. All goes well for a while. When
# > does it go wrong, and for whom?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# For the dummy's K and V nothing goes wrong: its whole table was filled with its own block when the rows were made, so they land there on
# every page. But its context passes the end of that table after `max_model_len` padded steps, some hundred or thousand, and with it the
# positions that the model knows. Then `gather` or the position's embedding gets an index out of range: on the CPU an exception, on a GPU a
# device-side assert, after which the whole process can use the GPU no more. So it goes wrong for everybody in that step, long after the mistake, and only
# on a server that has run for a while. That is why the context of the dummy stays at 0 by a rule, and not by luck. (The chapter's tests look
# at the dummy's context after each step, and at every slot of the cache.)
# </details>
#
# ## 4. Launching ahead
#
# With one graph a step, the CPU needs a fraction of the time. But it still waits: it launches, reads the tokens, and only then plans the next
# step. Meanwhile the GPU has nothing to do. Look at the middle panel, one sequence at a time again (recorded under the profiler, like the first picture, so the
# steps are longer than the titles say; and in the upper panel most kernels are thinner than a pixel):

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    viz.show(timeline.draw(report, 1))

# %% [markdown]
# A single replay takes the CPU a good part of the step, and in the lowest panel the CPU seems to do nothing else. With that one call the driver puts a few
# hundred kernels, the nodes of the graph, into the GPU's queue, and that takes time even without Python; under the profiler each of them is noted on top. Without the
# profiler, what the CPU does in a step takes (ms, medians):


# %%
def show_host(report, ways):
    print("batch  way    " + "".join(f"{name:>10s}" for name in timeline.PARTS))
    for run in report["runs"]:
        if run["way"] in ways:
            parts = "".join(f"{run['host_ms'][name]:10.3f}" for name in timeline.PARTS)
            print(f"{run['batch']:5d}  {run['way']:5s}  {parts}")


if report is None:
    print("skipped: nothing was recorded")
else:
    show_host(report, list(timeline.WAYS))

# %% [markdown]
# So launched ahead, too, the CPU waits for the GPU for a good part of the step, and that is what we want: the one that is waited for sets the pace.
#
# The lowest panel shows the way out. Why must step N be read before step N+1 is launched? To give it the sampled token; but that one is
# in the batch row already. To decide who takes part; but the scheduler decides from *counts*, and how many tokens a sequence will have after
# step N is known when step N is launched. So the host may be one step ahead. Only the *values* come later.
#
# The loop has one more line of state than before, the steps *in flight* (launched, and not read yet), and works at both depths:

# %% tags=["nbval-check-output"]
for async_scheduling in (False, True):
    engine = ch07.Engine(
        tiny, PageBrainConfig.for_model(tiny, **settings, async_scheduling=async_scheduling)
    )
    seq, order = engine.add_request([1, 2, 3], 4), []

    def launch(group, launch=engine.executor.launch, order=order):
        number = sum(event.startswith("launch") for event in order)
        order.append(f"launch {number}")
        step = launch(group)

        def read(wait=step.tokens.wait):
            order.append(f"read {number}")
            return wait()

        step.tokens.wait = read
        return step

    engine.executor.launch = launch
    while engine.step() is not None:
        pass
    print(f"depth {engine.depth}: {', '.join(order)}")

# %% [markdown]
# ### What follows from it
#
# *A token may be past the end.* When the end-of-sequence token is read, the next step is already under way, with this sequence in it. What
# that step samples is thrown away. (An end by `max_new_tokens` is known from counts: nothing is launched past it.)
#
# *Blocks come back late.* The step in flight still reads and writes the blocks of the sequence that has just ended. They are free when
# that step has been read; until then the sequence is *pending*, with its blocks and its row. This is why there are more rows than
# seats: who ended keeps a row, while another has its seat already. Would anything go wrong if they were free at once? On a single
# stream, no: the GPU works in order, and whoever gets the block writes to it in a later step. But then "free" would no longer mean that
# nobody touches the block. A second stream, a copy to the host's memory, or a cache of prefixes that others may read (chapter 08) relies on it.
#
# *A shortage is not always one.* If blocks run out while some are on their way back, it would be hasty to preempt anybody: wait a step.
#
# Let us see that. Two texts; the end token ends the first in mid-sentence:

# %% tags=["nbval-check-output"]
stories = [tokenizer.encode("One morning Mia"), tokenizer.encode("The fox and the owl")]
free_run = ch07.generate(exact, stories[:1], 12)[0]
exact.config.eos_token_id = free_run[5]  # as if the sixth token ended a text
room = {"block_size": 4, "num_blocks": 12, "max_num_seqs": 2, "max_model_len": 40}
engine = ch07.Engine(exact, PageBrainConfig.for_model(exact, **room, async_scheduling=True))
seqs = [engine.add_request(prompt, 12) for prompt in stories]
print("call   in flight after it   tokens of A   A            free blocks")
for call in range(10):
    engine.step()
    pending = seqs[0].seq_id in engine.retirement.pending
    state = "pending" if pending else "ended" if seqs[0].is_finished else "runs"
    print(
        f"{call:4d}   {len(engine.in_flight):18d}   {len(seqs[0].output_token_ids):11d}   "
        f"{state:10s} {engine.cache.num_free_blocks:13d}"
    )
while engine.step() is not None:
    pass
assert seqs[0].output_token_ids == free_run[:6]

# %% [markdown]
# A is pending for exactly one call: its end was read while the next step, with A in it, was in flight.
#
# ## Is it the same text?
#
# Graph or no graph, ahead or not, with too few blocks so that sequences are preempted: each logit in double precision, against Hugging
# Face, as always.

# %% tags=["nbval-check-output"]
exact.config.eos_token_id = None
prompts = [
    tokenizer.encode(text) for text in ("Once upon a time", "One day", "The fox said")
]
prompts.append(tokenizer.encode("In the garden, a little bird sat in a tree and sang."))
tight = {"block_size": 4, "num_blocks": 20, "max_num_seqs": 4, "max_num_batched_tokens": 8}
answers = set()
for use_graphs in (False, True):
    for async_scheduling in (False, True):
        mine = {}
        engine = ch07.Engine(
            exact,
            PageBrainConfig.for_model(
                exact, **tight, max_model_len=48, async_scheduling=async_scheduling
            ),
            lambda number, scores, mine=mine: mine.setdefault(number, []).append(scores),
            use_graphs=use_graphs,
        )
        seqs = [engine.add_request(prompt, 24) for prompt in prompts]
        while engine.step() is not None:
            pass
        for seq in seqs:
            with torch.no_grad():
                whole = exact(torch.tensor([seq.token_ids])).logits[0]
            theirs = whole[seq.num_prompt_tokens - 1 : -1]
            assert torch.allclose(torch.stack(mine[seq.seq_id]), theirs, atol=1e-9, rtol=0)
            assert seq.output_token_ids == theirs.argmax(-1).tolist()
        preempted = sum(seq.num_preemptions for seq in seqs)
        assert preempted > 0
        answers.add(tuple(tuple(seq.output_token_ids) for seq in seqs))
        print(
            f"graphs {use_graphs!s:5s}  depth {engine.depth}  {preempted} preemptions, "
            f"{len(engine.history)} steps: equal to Hugging Face"
        )
assert len(answers) == 1

# %% [markdown]
# The number of steps may differ a little between the depths, because blocks come back a step later. The text does not.
#
# The engine of this chapter is one that chapter 05 can serve with: `step` still returns who got something. A run of it, with prompts and
# decodes side by side:

# %%
names = dict(enumerate(["Once", "One day", "The fox", "In the garden"]))
viz.timeline(engine.history, names=names)

# %% [markdown]
# The white boxes in the middle are B and C, which need a block each while D's are on their way back; those behind an end are blocks
# that a step in flight still uses. Later C is preempted, although A ends and its blocks come back just one step later: when that step was planned,
# A's last token was still in flight, so A had not ended, none of its blocks were on their way back, and `make_room` saw a real shortage. (From counts one could have known that A was about to
# end. This scheduler does not look.)
#
# Prompts are computed beside the graph, as chapter 04 computes them: their shapes are different every time. A step with a prompt in it
# launches the graph of its decodes first, and then the prompt's chunk, launch by launch. Under load, when somebody joins at nearly every
# step, that is most of what the CPU does; what helps is habit 3 once more, as you can see in the engine.
#
# ## What was gained
#
# The same model, the same kernels, the same tokens:

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    show_runs(report, list(timeline.WAYS))

# %% [markdown]
# Two of these numbers need a word. Where there are two launches, the first is the graph and the second is the copy of the sampled tokens to the host. And the GPU seems busy
# for *longer* with a graph, as the pauses between two kernels of a graph are shorter than a microsecond, and those are counted as work (`GAP_S` in
# `chapters/aids/timeline.py`); the longer ones between eager launches are not.
#
# The kernels of a step take about as long as before. What went away is the time between them. With one graph a step, the GPU is idle only while
# the CPU reads, plans and launches; launched ahead, that happens while the GPU computes, and the step takes as long as the GPU needs.
# From here on it is the kernels again that set the pace.
#
# And this is the picture with 32 sequences. There the CPU's part of a step, scheduling and giving out tokens, is longer, and hidden all the same
# (drawn under the profiler, as before):

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    viz.show(timeline.draw(report, 32))

# %% [markdown]
# How far ahead could one go? Two steps in flight are enough to keep a GPU busy, as long as the CPU needs less time for a step than the GPU. Going
# further would bring nothing, and cost more tokens past the end, and blocks that come back later.
#
# ## Exercises
#
# `python -m chapters start 07` writes `work/ch07_full_speed.py` with its gaps, unless it is there already;
# `python -m chapters check 07` checks them. None of it needs a GPU. If you have one, your file runs there as it is, and
# `python -m pytest -m gpu tests/chapters` tries the reference on it.
#
# ### Exercise 7.1: batch rows (8 points)
#
# Write down for one sequence what travels in these steps: its prompt of 6 tokens is computed (blocks of 4); it decodes three times; it is
# preempted; it comes back. Which numbers does the host not even know when the second decode is launched ahead?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *The prompt:* the token at position 0, a context length of 0, and two blocks. (After the chunk, `Executor.launch` sends the new length.) *The
# decodes:* the tokens at positions 6 and 7 lie in the second block; with the one at position 8 a third block travels, and nothing
# else. *Preempted:* nothing; the row is released when no step in flight uses it. *Back again:* it is as new, with a row and with blocks that
# may be others, and everything travels. So what was sent before must be forgotten with the row.
#
# The host does not know the token. It is in the row.
# </details>

# %%
viz.show_task(ch07.BatchRows.update)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.BatchRows.update, ch07.BatchRows.release)

# %% [markdown]
# ### Exercise 7.2: who takes part (6 points)
#
# Two small functions. For `activate`, write down what `active_rows` holds after `activate([3, 0, 7, 5], 4)` and then `activate([2, 6], 4)`. Whose
# row would stand in the third place if you wrote only the names that you were given?

# %%
viz.show_task(ch07.bucket_for)

# %%
viz.show_task(ch07.BatchRows.activate)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.bucket_for, ch07.BatchRows.activate)

# %% [markdown]
# ### Exercise 7.3: the step (8 points)
#
# Make a list of the tensors that the step reads, and of those that it writes. For each: where is it on the GPU, and was it there
# before the step was captured? Then take a row with a context of 9 in blocks of 4, whose table begins with 12, 3, 8. Which slot does its
# token go to? Only then write it. `forward` and `attend_rows` do most of the work.
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *Read:* `active_rows`, and of the rows that it names `token_ids`, `context_lens`, `block_tables`; the weights; the pools. *Written:* a slot of the
# pools for each layer and row, `logits`, `sampled`, and of the rows `token_ids` and `context_lens`. All of them were there before.
# What you make in between (positions, slots, hidden states) belongs to the graph, which computes it again each time.
#
# Position 9 is in page 2, offset 1. The table's entry for page 2 is 8, so the slot is 8 × 4 + 1 = 33.
# </details>

# %%
viz.show_task(ch07.decode_step)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.decode_step)

# %% [markdown]
# ### Exercise 7.4: the loop (7 points)
#
# Play both depths on paper for one sequence that asks for three tokens: in each call of `step`, what is planned, what is in flight, what is read, what
# is returned? When is there nothing to plan, though not all is done?
#
# <details><summary><b>The answer for depth 1, when you have yours</b></summary>
#
# Call 0: step 0 is launched; one is in flight, which is not more than the depth; nothing is read, and an empty group is returned. Call 1: step 1 is launched;
# two are in flight; step 0 is read. Call 2: step 2 is launched, step 1 is read. Call 3: from counts, the sequence will have all its tokens, so nothing is
# planned; step 2 is read, and the sequence ends. Call 4: nothing is planned, nothing is in flight: `None`.
# </details>

# %%
viz.show_task(ch07.Engine.step)

# %%
viz.show_task(ch07.Engine.apply)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.Engine.step, ch07.Engine.apply)

# %% [markdown]
# ### Exercise 7.5: late blocks (6 points)
#
# This one needs 7.4: its last tests run the whole engine.
#
# A, B and C run at depth 1, and the pool is full. B ended with the step that was read last; the step in flight has all three in it. A needs a block. What
# should happen now, and what in the next step? And if B had not ended: who gives its blocks, when does A get one, and who must not be preempted on top?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# B is pending, and its blocks are on their way back: A stands aside for one step, with all that it has. When the step in flight has been read they are
# free, and A takes one.
#
# If B had not ended, C is preempted, as the latest arrival. It is in flight, so its blocks are on their way from now on. There is no room yet, and
# still nobody else may be preempted: `make_room` says no, and A asks again in the next step. Chapter 04's loop would have gone on, to B and then to A
# itself.
# </details>

# %%
viz.show_task(ch07.LateRetirement.collect)

# %%
viz.show_task(ch07.Scheduler.make_room)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.LateRetirement.collect, ch07.Scheduler.make_room)

# %% [markdown]
# ## In the engine
#
# `pagebrain/worker/batch_rows.py` holds the rows, with what sampling needs and with all tokens of a text, in one buffer. `pagebrain/worker/graphs.py` captures a graph for
# each bucket, and others for prompts: a few numbers of tokens, filled up with the dummy's, so that those who join a batch are one launch
# too. `pagebrain/worker/cuda_executor.py` launches them. `pagebrain/cache.py` and `Engine.step` are what you have written
# here, with errors, observers and traces. Its decode attention is a kernel, so its graphs read no more than there is.
#
# ## What the next chapter must fix
#
# Every sequence has blocks of its own, even if a hundred of them begin with the same thousand tokens. Those are computed a hundred times, and lie a
# hundred times in memory. Chapter 08 lets sequences share blocks.
