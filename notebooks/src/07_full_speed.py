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
# The engine of chapter 04 plans well. But on a GPU it is slow, even with the kernels of chapter 06, and the GPU is not
# the reason. This chapter shows where the time of a step goes, and removes Python from the path of a decode step. No kernel
# gets faster, and a step becomes several times shorter.
#
# **You need:** chapter 04. You need no GPU: what a GPU would do is recorded, or done on the CPU by a stand-in that follows the same
# rules. Without a GPU this chapter uses no Triton, so any system that runs the earlier chapters is enough. **Time:** about seven hours with the exercises.
#
# *You will be able to* say what sets the pace of a decode step, keep the state of sequences in fixed places on the GPU, write a step
# that can be captured as a CUDA graph and replayed, pad batches without a branch, and launch a step before the last one is read,
# with everything that follows from it.
#
# *In a copy from a course, the cells use your own file in `work/`. Tasks that you have not done yet are lent to the notebook, so every
# cell runs. Each exercise stands right after the idea that it needs. `python -m chapters start 07` writes `work/ch07_full_speed.py`
# with its gaps, and `python -m chapters check 07` checks it. No exercise needs a GPU.*

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
# A decode step is a list of *launches*. The CPU asks for one operation after another, with one call for each kernel, and the GPU works
# through the list in order. The calls do not wait for the kernels, so the CPU may be far ahead. The CPU has to wait only when it needs a
# number that the GPU computes, as in `tokens.tolist()`.
#
# Three terms: *eager* means that each operation is launched when Python comes to it. A *stream* is a queue of launches, which the GPU works through in
# order. The *driver* is the library of the GPU's maker that puts launches into the queue.
#
# Below are three decode steps of GPT-2 124M for one sequence, drawn from a recording on one machine. The upper row is
# the CPU, the lower row is the GPU. On a GPU this cell records anew, in less than a minute. Elsewhere it reads the recording.

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
# The CPU is busy all the time with launches. The GPU has a few microseconds of work, and then waits for the next call.
# (Each call goes through layers of Python and C++: a module's `forward`; PyTorch's dispatcher, which finds the function for the tensors' device and dtype;
# the choice of a kernel; the driver.)
#
# Four remarks on the picture. First, the steps between the dotted lines are *longer than the title says*. The picture was recorded under a
# *profiler*, a tool that notes every call and every kernel with its times, and so slows the CPU down. The time in the title was measured without it. Second, in
# the stored recording these three steps are slow ones even for profiled steps: they took about 20 ms each, and the median of all 24 profiled steps is 11.8 ms (in the
# table under *profiled*). The recording has the details of these three only. Third, the other parts of the CPU's row (schedule, prepare, wait, output) take less
# than 0.1 ms together, and are thinner than a line here. Fourth, most kernels are thinner than a pixel, too, so the blue of a line is not to scale. The table says
# how long the GPU was busy.
#
# In numbers, with the length of a step without the profiler and with it:


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
# The number of launches does not depend on the machine, and hardly on the size of the model. It is the number of operations that the
# code asks for, so any CPU can count them. `Recording`, which is explained below, writes down every operation that PyTorch is asked
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
# kernels. So the CPU needs about as long for 32 sequences as for one, and each step brings 32 tokens. (The CPU of the recording had other
# users, too. Its milliseconds are good for comparing ways at one batch size, not for small differences between two sizes.)
#
# So batching helps even a slow host, because one list of launches brings 32 tokens. It also means that a single user waits for Python almost all
# of the time.
# </details>
#
# ## Four habits
#
# The rest of the step costs time, too. Chapter 04 makes its tensors anew at every step: token ids, positions, slots, block tables. Each
# is a copy from the host, and the CPU waits for a copy out of ordinary memory until it is done. Four habits remove nearly all of
# this. Each of them makes the next one possible:
#
# 1. **Batch rows.** State lies on the GPU. Each running sequence has a fixed row there, and only changes travel.
# 2. **A captured step.** All launches from embedding to sampled token are recorded once and replayed with one call. On a GPU such a recording is a **CUDA graph**.
# 3. **A dummy sequence.** There is one graph for each of a few batch sizes, the **buckets**. A smaller batch is padded, and the kernels treat all rows alike.
# 4. **Launching ahead.** Step N+1 is launched before step N is read.
#
# ## 1. Batch rows
#
# What does a decode step need to know about a sequence? Its newest token, the position of this token, and where its K and V lie.
# The *step before* produced the token and the position, so it can leave them in the place where the next step reads them. Only the host
# knows the block table, and this changes once in `block_size` steps, by one number.

# %%
viz.show_source(ch07.BatchRows.__init__, ch07.BatchRows.send)

# %% [markdown]
# Two helpers of `chapters/aids/capture.py` carry numbers between host and GPU, and the host waits for neither. `upload(numbers, device)` makes a tensor on the GPU,
# in one copy out of *pinned* memory. (This is memory of the host that the operating system does not move. So the GPU can fetch from it by itself, while the CPU
# goes on.) `Download(tensor)` starts a copy to the host, and only its `wait()` waits and returns the numbers.
#
# Let three texts run, and note what travels to the rows in each step. Blocks have four slots. The second number is what chapter 04 sends
# for the same step: for each token its id, position and slot; for each sequence a row of the table, as long as the longest, its length, and where its tokens
# begin; and one number more, where the last sequence's tokens end.


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
# token, so it is a decode.) From then on nothing travels but a block now and then. These are the rows in memory. A sequence takes a free row, and the row does not move when
# other sequences end. The last row is the dummy's, and its block is never given to a sequence.

# %% tags=["nbval-check-output"]
rows = engine.executor.rows
print("row   token   context   block table          held by")
for row in [*sorted(rows.row_of.values()), rows.dummy_row]:
    token, context, *blocks = rows.state[row, :6].tolist()
    holder = next((seq_id for seq_id, at in rows.row_of.items() if at == row), "the dummy")
    token = "any" if row == rows.dummy_row else str(token)
    print(f"{row:3d}   {token:>5s}   {context:7d}   {str(blocks):20s} {holder}")

# %% [markdown]
# There are twice as many rows as seats. The reason follows in section 4.
#
# ### Exercise 7.1: batch rows (8 points)
#
# Write down for one sequence what travels in these steps: its prompt of 6 tokens is computed (blocks of 4), it decodes three times, it is
# preempted, it comes back. Which numbers does the host not even know when the second decode is launched ahead?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *The prompt:* the token at position 0, a context length of 0, and two blocks. (After the chunk, `Executor.launch` sends the new length.) *The
# decodes:* the tokens at positions 6 and 7 lie in the second block. With the token at position 8 a third block travels, and nothing
# else. *Preempted:* nothing. The row is released when no step in flight uses it. *Back again:* the sequence is as new. It gets a row, its blocks
# may be others, and everything travels. So what was sent before must be forgotten with the row.
#
# The host does not know the token. It is in the row.
# </details>

# %%
viz.show_task(ch07.BatchRows.update)

# %%
viz.show_task(ch07.BatchRows.release)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.BatchRows.update, ch07.BatchRows.release)

# %% [markdown]
# ## 2. A step that can be captured
#
# CUDA can record what is launched on a stream, and launch all of it again with one call. Such a recording is a *CUDA graph*. It contains no Python,
# no dispatcher, and no choice of kernels. It contains only kernels, and the addresses that they read and write. On a CPU,
# `Recording` is the stand-in. It writes down PyTorch's operations with their tensors, and computes them again on the same
# memory. `capture` makes the one or the other:

# %%
viz.show_source(ch07.capture)

# %% [markdown]
# What does "the same memory" mean for the author of a step? Three experiments show it. First, a buffer that is written to, and a name
# that is bound to a new tensor:

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
# Second, a Python number. A recording holds the value that the number had:

# %% tags=["nbval-check-output"]
source, length = torch.arange(5), 2
replay = capture.capture(lambda: result[:1].copy_(source[:length].sum()), CPU)
length = 5
replay()
print("the sum of the first 5 should be 10, and is", result[:1].tolist())

# %% [markdown]
# Third, a step that looks at a result. On a GPU this cannot work: while a step is recorded nothing is computed, so there is
# no result yet. CUDA refuses it. The stand-in on the CPU does compute while it records, and refuses it all the same. A number *from* the host is refused,
# too: `x[0] = 1` copies the number 1 to the GPU, from memory that may hold something else when the graph is replayed. `zero_()` and `fill_()` launch a
# kernel that has the number in it. For the same reason a tensor that a step makes needs `device=`: without it the tensor is the host's.

# %% tags=["nbval-check-output"]
for name, step in {
    "x.sum().item()": lambda: source.sum().item(),
    "if x.sum() > 3": lambda: 1 if source.sum() > 3 else 0,
    "x[x > 1]": lambda: source[source > 1],
    "x[0] = 1": lambda: source.__setitem__(0, 1),
    "x[:1].fill_(1)": lambda: source[:1].fill_(1),
}.items():
    try:
        capture.capture(step, CPU)
        print(f"{name:15s} can be captured")
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
# The loop runs while it is recorded, and its number of turns becomes a part of the recording. To know this number, the host has to read the longest
# length from the GPU. `int(lengths.max())` is what is refused here. (The whole function is refused even sooner, at a `repeat_interleave`.) Even if the host
# counted along and did not read, the recording would be right only for contexts of that many pages, and contexts grow.
# </details>
#
# So in a captured step every shape is fixed. This chapter gathers each row's whole table and masks what lies past its position. That
# reads more than it needs. A kernel, as in chapter 06, reads on the GPU how far its context goes, and its grid is the same
# for all lengths. The engine's graphs contain such a kernel.

# %%
viz.show_source(ch07.attend_rows)

# %% [markdown]
# With batch rows, such a step is short to describe: take the active rows, compute, and write the token back to its row.
# Everything that differs from step to step is *in* the tensors: in `state`, and in `active_rows`, which names the rows that a step computes.

# %% [markdown]
# ## 3. Buckets, and a dummy sequence
#
# A graph is for one number of rows. A graph for every number up to 256 would take long to capture and need much memory. So there are a few sizes, the
# *buckets*, and a batch takes the smallest bucket that holds it. Then some rows of the bucket are left over. The kernels compute them like the others: a row
# index is read, a token is embedded, K and V are written to a slot. One could tell each kernel how many rows count. There is a simpler
# way: a *dummy sequence*, in the last batch row, at position 0, with a block of its own. The left-over rows are all this row. It is computed like any other row, as often as
# needed, and its results are not used.

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
# > **Predict.** Suppose that the step adds one to the context of *every* active row, the dummy's too. For a while all results are right. When
# > does it go wrong, and for which sequences?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# The dummy's K and V do no harm: its whole table was filled with its own block when the rows were made, so they go to this block on
# every page. But its context passes the end of the table after `max_model_len` padded steps, some hundred or thousand, and also the last
# position of the model. Then `gather` or the position's embedding gets an index out of range. On the CPU that is an exception. On a GPU it is a
# *device-side assert*: the kernel itself finds the wrong index and stops, and after that the whole process cannot use the GPU any more. So it goes wrong for all sequences of that step, long after the mistake, and only
# on a server that has run for a while. That is why the context of the dummy is set to 0 after each step. (The chapter's tests look
# at the dummy's context after each step, and at every slot of the cache.)
# </details>
#
# ### Exercise 7.2: the active rows (6 points)
#
# These are two small functions. Buckets are any numbers, in any order. For `activate`, write down what `active_rows` holds after `activate([3, 0, 7, 5], 4)` and then
# `activate([2, 6], 4)`. Which row would stand in the third place if you wrote only the two row numbers that you were given?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# After the first call: 3, 0, 7, 5. After the second: 2, 6 and twice the dummy's row. Without padding, 7 and 5 would stand in the third and fourth place, from
# the call before, and the step would compute their sequences a second time. What stands behind the fourth place does not matter, because no step of bucket 4 reads it.
# </details>

# %%
viz.show_task(ch07.bucket_for)

# %%
viz.show_task(ch07.BatchRows.activate)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.bucket_for, ch07.BatchRows.activate)

# %% [markdown]
# ### Exercise 7.3: the step (8 points)
#
# Now everything that the step needs is there. Make a list of the tensors that the step reads, and of those that it writes. For each: where is it on the GPU, and was it there
# before the step was captured? Then take a row with a context of 9 in blocks of 4, whose table begins with 12, 3, 8. Which slot does its
# token go to? Only then write the function. `forward` and `attend_rows` do most of the work. After each step the context
# of the dummy row is 0.
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
# ## 4. Launching ahead
#
# With one graph a step, the CPU needs a fraction of the time. But it still waits: it launches, reads the tokens, and only then plans the next
# step. Meanwhile the GPU has nothing to do. The middle panel shows this for one sequence (recorded under the profiler, like the first picture, so the
# steps are longer than the titles say; and in the upper panel most kernels are thinner than a pixel):

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    viz.show(timeline.draw(report, 1))

# %% [markdown]
# A single replay takes the CPU a good part of the step. Apart from waiting, the launch is the longest part of the CPU's step. With this one call the driver puts a few
# hundred kernels, the nodes of the graph, into the GPU's queue. That takes time even without Python, and the profiler notes each of them in addition. Without the
# profiler, the CPU's parts of a step are (ms, medians):


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
# Also when it launches ahead, the CPU waits for the GPU during a good part of the step. That is what we want: the GPU sets the pace, and the CPU waits for it.

# %% [markdown]
# The lowest panel shows how the gap is closed. Why must step N be read before step N+1 is launched? There are two reasons, and neither holds. The next step needs the sampled token, but this token
# is in the batch row already. The scheduler has to decide which sequences take part, but it decides from *counts*, and how many tokens a sequence will have after
# step N is known when step N is launched. So the host can be one step ahead. Only the *values* come later.
#
# The loop has one more variable than before, the steps *in flight* (launched, and not read yet), and works at both depths. At depth 1 one step is in flight while
# the next is planned. At depth 0 none is:

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
# ### Exercise 7.4: the loop (7 points)
#
# Play both depths on paper for one sequence that asks for three tokens: in each call of `step`, what is planned, what is in flight, what is read, what
# is returned? When is there nothing to plan, although the work is not finished?
#
# `apply` needs one more thought. When the end-of-sequence token is read, the next step is already under way, with this sequence in it. *A token may be past the
# end*: what that step samples for the sequence is thrown away. (An end by `max_new_tokens` is known from counts, so nothing is launched past it.)
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *Depth 0.* Calls 0, 1 and 2: a step is planned and launched; one is in flight, which is more than the depth, so it is read at once and its group is returned.
# With the third token the sequence ends. Call 3: nothing is planned, nothing is in flight: `None`.
#
# *Depth 1.* Call 0: step 0 is launched; one is in flight, which is not more than the depth; nothing is read, and an empty group is returned. Call 1: step 1 is launched;
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
# ### Blocks that come back late
#
# The step in flight still reads and writes the blocks of the sequence that has just ended. These blocks are free when
# that step has been read. Until then the sequence is *pending*, with its blocks and its row. This is why there are more rows than
# seats: a sequence that ended keeps its row, while another has its seat already. Would anything go wrong if the blocks were free at once? On a single
# stream it would not: the GPU works in order, and the next sequence with the block writes to it in a later step. But then "free" would no longer mean that
# no step uses the block. A second stream, a copy to the host's memory, or a cache of prefixes that other sequences read (chapter 08) relies on that meaning.
#
# *A shortage may be over soon.* If blocks run out while others are on their way back, preempting a sequence would be too early. The scheduler waits for one step.
#
# This cell shows it. There are two texts, and the end token ends the first in the middle of a sentence:

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
# ### Exercise 7.5: late blocks (6 points)
#
# The last tests of this exercise run the whole engine.
#
# A, B and C run at depth 1, and the pool is full. B ended with the step that was read last. The step in flight has all three in it. A needs a block. What
# should happen now, and what in the next step? (In `make_room`, a victim goes to `self.retirement.retire`. What chapter 04 calls, `self.cache_manager.retire`,
# frees the blocks at once.) And if B had not ended: which sequence gives its blocks, when does A get one, and which sequence must not be preempted as well?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# B is pending, and its blocks are on their way back. A does not take part in one step, and keeps everything that it has. When the step in flight has been read, the blocks are
# free, and A takes one.
#
# If B had not ended, C is preempted, because it arrived last. It is in flight, so its blocks are on their way from now on. There is no room yet, and
# still no other sequence may be preempted: `make_room` says no, and A asks again in the next step. Chapter 04's loop would have gone on, to B and then to A
# itself.
# </details>

# %%
viz.show_task(ch07.LateRetirement.collect)

# %%
viz.show_task(ch07.Scheduler.make_room)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.LateRetirement.collect, ch07.Scheduler.make_room)

# %% [markdown]
# ## Is it the same text?
#
# With a graph and without, launched ahead and not, with so few blocks that sequences are preempted: each logit is compared with Hugging
# Face in double precision, as in the other chapters.

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
# The number of steps may differ a little between the depths, because blocks come back a step later. The text does not differ.
#
# Chapter 05 can serve with this engine: `step` still returns the sequences that got something. Here is a run with prompts and
# decodes side by side:

# %%
names = dict(enumerate(["Once", "One day", "The fox", "In the garden"]))
viz.timeline(engine.history, names=names)

# %% [markdown]
# A white box ("not in the step") is a sequence that holds blocks and is not computed in the step. In the middle these are B and C, which need a block each while
# D's blocks are on their way back. Behind an end, the sequence that ended still holds its blocks, because a step in flight uses them. Later C is preempted, although A ends and its blocks come back just one step later. When that step was planned,
# A's last token was still in flight, so A had not ended, none of its blocks were on their way back, and `make_room` saw a real shortage. (The counts would have shown that A was about to
# end. This scheduler does not look at that.)
#
# Prompts are computed beside the graph, as chapter 04 computes them, because their shapes are different every time. A step with a prompt in it
# launches the graph of its decodes first, and then the prompt's chunk, launch by launch. Under load, when a request joins at nearly every
# step, these launches are most of the CPU's work. Habit 3 helps there, too, as you can see in the engine.
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
# Two of these numbers need an explanation. Where there are two launches, the first is the graph and the second is the copy of the sampled tokens to the host. And the GPU seems busy
# for *longer* with a graph. The pauses between two kernels of a graph are shorter than a microsecond, and such pauses are counted as work (`GAP_S` in
# `chapters/aids/timeline.py`). The longer pauses between eager launches are not.
#
# The kernels of a step take about as long as before. The time between them is gone. With one graph a step, the GPU is idle only while
# the CPU reads, plans and launches. Launched ahead, that happens while the GPU computes, and the step takes as long as the GPU needs.
# From here on the kernels set the pace again.
#
# This is the picture with 32 sequences. There the CPU's part of a step, scheduling and giving out tokens, is longer, and it is hidden all the same
# (drawn under the profiler, as before):

# %%
if report is None:
    print("skipped: nothing was recorded")
else:
    viz.show(timeline.draw(report, 32))

# %% [markdown]
# ### Exercise 7.6: which gap does the host make? (3 points)
#
# In the pictures of section 4, the middle panel has one large gap in each step, in which the GPU is idle. Measure it in the recording, and explain it. `run["timeline"]` has the data of a
# panel: `step_starts_us`; in `gpu` when the GPU was busy; and the CPU's parts as `host`. A step has 356 kernels, but only four or five entries of `gpu`, because
# kernels with less than a microsecond between them are one entry. This is the beginning of the middle panel:

# %%
if RECORDED.is_file():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    run = next(r for r in recorded["runs"] if r["batch"] == 1 and r["way"] == "graph")
    print("steps start at ", run["timeline"]["step_starts_us"][:4])
    print("the GPU is busy", run["timeline"]["gpu"][:3])
    print("the CPU does   ", run["timeline"]["host"][:5])

# %%
viz.show_task(ch07.answer_7_6)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch07.answer_7_6)

# %% [markdown]
# How far ahead could one go? Two steps in flight are enough to keep a GPU busy, as long as the CPU needs less time for a step than the GPU. More
# steps in flight would gain nothing. They would cost more tokens past the end, and blocks would come back later.
#
# ## In the engine
#
# `pagebrain/worker/batch_rows.py` holds the rows in one buffer, with what sampling needs and with all tokens of a text. `pagebrain/worker/graphs.py` captures a graph for
# each bucket. It captures other graphs for prompts: a few numbers of tokens, filled up with the dummy's, so that requests that join a batch are one launch
# too. `pagebrain/worker/cuda_executor.py` launches the graphs. `pagebrain/cache.py` and `Engine.step` are what you have written
# here, with errors, observers and traces. The engine's decode attention is a kernel, so its graphs read no more than there is. If you have a GPU, your file runs there
# as it is, and `python -m pytest -m gpu tests/chapters` tries the reference on it.
#
# ## What the next chapter must fix
#
# Every sequence has blocks of its own, even if a hundred of them begin with the same thousand tokens. These tokens are computed a hundred times, and lie in
# memory a hundred times. Chapter 08 lets sequences share blocks.
