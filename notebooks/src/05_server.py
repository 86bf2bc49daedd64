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
# # Chapter 05: the engine behind HTTP
#
# In chapter 04 the engine decides at every step which sequences it computes. The caller cannot use that: `generate` wants all
# prompts at the start and returns all answers at the end. On a server, requests arrive at any time. Each client wants each
# token as soon as it is computed, and a client may leave before its answer is complete. This chapter adds the loop that drives
# the engine for such clients. Scheduler, cache and attention stay as they are.
#
# **You need:** chapter 04; `async` functions and generators, `try` and `finally`. **Time:** about three and a half hours with
# the exercises if you have used `asyncio` before, and four and a half to five hours if you know only `async` and `await`.
# The parts of `asyncio` that the tasks use are listed below, with links.
#
# *You will be able to* let many clients share one engine, say what runs in a thread and what on the event loop, avoid a lost
# wake-up, and free the memory of a client that closes its connection.
#
# Each exercise stands right after its idea. `python -m chapters start 05` writes `work/ch05_server.py` with five gaps, unless
# the file is there already. `python -m chapters check 05` checks them, and `check 5.1` checks one.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/`. Where a task of it is not
# done yet, they run on a lent function, and the first cell says so.*
#
# <details><summary><b>What the tasks use of Python's <code>asyncio</code></b></summary>
#
# - `asyncio.create_task(coroutine)` starts a coroutine as a [task](https://docs.python.org/3/library/asyncio-task.html#creating-tasks),
#   which runs beside the code that started it.
# - `task.cancel()` asks a task to end: [`asyncio.CancelledError`](https://docs.python.org/3/library/asyncio-task.html#task-cancellation)
#   is raised in it, at the `await` where it waits. It is a `BaseException` and no `Exception`: `except Exception` does not catch it, and
#   `finally` blocks run.
# - [`asyncio.to_thread(function)`](https://docs.python.org/3/library/asyncio-task.html#asyncio.to_thread) calls a function in a
#   thread. The coroutine that awaits it is set aside until the function returns, and gets its result or its exception.
# - [`asyncio.Event`](https://docs.python.org/3/library/asyncio-sync.html#asyncio.Event) is a flag with `set()` and `clear()`.
#   `await event.wait()` waits until the flag is set, and returns immediately if it is set already.
# - [`asyncio.Queue`](https://docs.python.org/3/library/asyncio-queue.html#asyncio.Queue): `put_nowait(item)` adds an item at the
#   end. `await queue.get()` takes the oldest item, and waits while there is none.
# - An [asynchronous generator](https://docs.python.org/3/reference/expressions.html#asynchronous-generator-functions) is an
#   `async def` with a `yield`. `async for` takes its items. Calling it runs none of its code: that starts with the first `anext`.
#   `aclose()` ends it: `GeneratorExit` is raised at the `yield` where it stands. It is no `Exception` either.
# - [`contextlib.aclosing(generator)`](https://docs.python.org/3/library/contextlib.html#contextlib.aclosing) calls `aclose()` at the
#   end of an `async with` block, however the block ends.
# </details>

# %%
import sys

sys.path.insert(0, "..")  # the folder that holds the chapters

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager

import httpx
import torch
import uvicorn
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
ch04, ch05 = load_stage("04"), load_stage("05")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
model.config.eos_token_id = None  # for measuring: an answer is as long as was asked for
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
starts = ["One day", "The fox said", "A boy", "It was a good day."]
prompts = [tokenizer.encode(line) for line in starts]


def new_engine(base, **how):
    """Chapter 04's engine with 256 blocks of 16 tokens and 32 seats."""
    config = PageBrainConfig.for_model(
        base, block_size=16, num_blocks=256, max_num_seqs=32, max_num_batched_tokens=128
    )
    return ch04.Engine(base, config, **how)


# %% [markdown]
# ## The problem, measured
#
# Four prompts go into chapter 04's `generate` together. After which step was each answer complete, and after which step did the
# caller get it?

# %% tags=["nbval-check-output"]
traces = []
answers = ch04.generate(exact, prompts, 150, on_step=traces.append)
ended = {seq_id: trace.step for trace in traces for seq_id in trace.finished}
for index, (start, answer) in enumerate(zip(starts, answers, strict=True)):
    done, handed_over = ended[index], traces[-1].step
    print(f"{start!r:21} {len(answer):3} tokens, complete after step {done:3}, ", end="")
    print(f"handed over after step {handed_over}")
preempted = {starts[seq_id] for trace in traces for seq_id in trace.preempted}
print("preempted in between:", *preempted)

# %% [markdown]
# The first token of every story was there after the first step. No client saw one before the last step. The last step came
# late, because one story had to wait for blocks.
#
# These four requests also arrived together. Now they arrive one after the other, 20 milliseconds apart. A call of `generate`
# holds the engine until it returns, so each call waits until those before it have returned.


# %%
def report(times):
    """A line for each client: milliseconds from its arrival to its first and its last token."""
    for start, (first, last) in zip(starts, times, strict=True):
        print(
            f"{start!r:21} first token after {first * 1e3:4.0f} ms, last after {last * 1e3:4.0f} ms"
        )


def one_call(prompt):
    return ch04.generate(model, [prompt], 60)


async def call_in_turn(number, counter):
    await asyncio.sleep(0.02 * number)
    arrived = time.perf_counter()
    await asyncio.get_running_loop().run_in_executor(counter, one_call, prompts[number])
    return (time.perf_counter() - arrived,) * 2  # all tokens come together


one_call(prompts[0])  # the first run also warms the machine up
with ThreadPoolExecutor(1) as counter:
    one_by_one = await asyncio.gather(
        *(call_in_turn(number, counter) for number in range(4))
    )
report(one_by_one)

# %% [markdown]
# The first column is the *time to first token*. Here it is the rest of the answers of all earlier clients, plus the whole of the
# client's own answer. Yet the engine could have started the second request at its next step.
#
# ## The idea
#
# Two things have to go on at the same time: the engine computes, and connections come and go.
#
# Python's `asyncio` runs many *coroutines* in one thread, on an *event loop*. A coroutine runs until an `await` for something
# that is not there yet. Then it is set aside, and the loop runs another one. This suits connections, which wait most of the
# time. It does not suit a step, which computes and never awaits. We measure the effect: a coroutine wants to run every
# millisecond, while one step reads a prompt of 900 tokens.

# %% tags=["nbval-check-output"]
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:900]
config = PageBrainConfig.for_model(model, num_blocks=64, max_num_batched_tokens=1024)


async def count_beats(run):
    """How often another coroutine runs while ``run`` works."""
    engine, beats = ch04.Engine(model, config), []
    engine.add_request(text, 1)

    async def heart():
        while True:
            beats.append(time.perf_counter())
            await asyncio.sleep(0.001)

    beating = asyncio.create_task(heart())
    await asyncio.sleep(0.01)
    began = time.perf_counter()
    await run(engine)
    ended = time.perf_counter()
    beating.cancel()
    return sum(began < beat < ended for beat in beats)


async def in_the_loop(engine):
    engine.step()


async def in_a_thread(engine):
    await asyncio.to_thread(engine.step)


on_the_loop, in_thread = await count_beats(in_the_loop), await count_beats(in_a_thread)
print("beats while a step runs on the event loop:", on_the_loop)
print("beats while it runs in a thread:", "some" if in_thread else "none")

# %% [markdown]
# While a step runs on the loop, no connection is accepted and no token is sent. So a step runs in a thread, and the loop
# `await`s it.
#
# Now there are two threads, and the engine must be protected. If a client arrives while a step is running, the event loop must
# not call `add_request`, because the step is changing the same lists. A lock would work, but the event loop would have to wait
# for it, and every use of the engine would have to take it. This chapter uses a simpler rule. **A client that arrives or leaves
# adds a note to a list, and the notes are read between two steps.** The lists need no lock, because only coroutines of one
# event loop touch them, and a coroutine is never interrupted between two `await`s.

# %%
viz.show_source(ch05.Client, ch05.AsyncEngine.__init__)

# %% [markdown]
# The attributes that the methods share:
#
# - `clients`: the clients that the engine serves, keyed by sequence id (`client.seq.seq_id`). A client comes in when its arrival is
#   read, and goes out when its departure is read or its sequence has finished.
# - `arrived` and `departed`: the notes, oldest first. A note is the `Client` itself.
# - `note`: an event that is set whenever a note is added, so that a sleeping loop wakes up.
# - `failure`: the exception that ended the engine, `None` while it works.
#
# `client.seq.is_finished` says whether a sequence has ended, after its last token or by `Engine.finish`.

# %% [markdown]
# ## What runs when
#
# Three clients share an engine, and we record the time of every event: when a step begins and ends, when a note is written, when
# it is read, and when a client receives a token. Clients B and C arrive while a step is running. C asks for 40 tokens and leaves
# after three. (A step of this small model takes a few milliseconds, too short to draw beside the microseconds of the event loop.
# So in this one run each step sleeps for another 20 milliseconds.) Each client reads its tokens from
# `shared.stream(prompt, wanted)`. It is an asynchronous generator, and you write it in task 5.4.


# %%
@asynccontextmanager
async def shared_by_all(engine):
    """An engine that clients can stream from, for as long as the block runs."""
    shared = ch05.AsyncEngine(engine)
    loop = asyncio.create_task(shared.run())
    try:
        yield shared
        while shared.departed and not loop.done():
            await asyncio.sleep(0.001)
        if loop.done():
            loop.result()  # it ends only by failing: raise what ended it
    finally:
        loop.cancel()


names = {tuple(prompt): name for prompt, name in zip(prompts, "ABC", strict=False)}
steps, readings, came, gone = [], [], {}, {}
received = {name: [] for name in "ABC"}


def watch(shared):
    """Write down when a step runs, and which notes are read when."""
    compute, look_at_notes = shared.engine.step, shared.read_notes

    def timed_step():
        began = time.perf_counter()
        group = compute()
        if group is not None:
            time.sleep(0.02)  # long enough to be drawn
            steps.append((began, time.perf_counter()))
        return group

    def timed_reading():
        notes = [("+", names[tuple(client.prompt)]) for client in shared.arrived]
        notes += [("-", names[tuple(client.prompt)]) for client in shared.departed]
        readings.append((time.perf_counter(), notes))
        look_at_notes()

    shared.engine.step, shared.read_notes = timed_step, timed_reading


async def visit(shared, name, prompt, after, wanted, reads):
    """Arrive during a step, after A's token number ``after``; read ``reads`` tokens."""
    while len(received["A"]) < after:
        await asyncio.sleep(0.001)
    if after:
        await asyncio.sleep((steps[-1][1] - steps[-1][0]) / 2)
    came[name] = time.perf_counter()
    async with aclosing(shared.stream(prompt, wanted)) as tokens:
        async for _ in tokens:
            received[name].append(time.perf_counter())
            if len(received[name]) == reads:
                gone[name] = time.perf_counter()
                if reads < wanted:
                    break


engine = new_engine(model)
async with shared_by_all(engine) as shared:
    watch(shared)
    await asyncio.gather(
        visit(shared, "A", prompts[0], after=0, wanted=12, reads=12),
        visit(shared, "B", prompts[1], after=2, wanted=7, reads=7),
        visit(shared, "C", prompts[2], after=4, wanted=40, reads=3),
    )
print(
    f"{len(steps)} steps with a client in them; the notes were read {len(readings)} times"
)


# %%
viz.lanes(
    [
        (*times, "".join("ABC"[row.seq_id] for row in trace.rows))
        for times, trace in zip(steps, engine.history, strict=True)
    ],
    readings,
    {name: viz.Visit(came[name], received[name], gone[name]) for name in "ABC"},
)

# %% [markdown]
# Follow C. It arrives during a step, and its note stays in the list until that step is over. C is in the next step, and has its
# first token after that step, while A is in the middle of its answer. (A dot stands a few milliseconds behind the end of its
# step. The next step begins meanwhile, and Python runs the code of only one thread at a time, so the clients wait a little.) When
# C leaves, the next step has begun already, with C in it. The token of that step has no reader. This is the price of reading
# notes only between steps: at most one step for each departure.

# %% tags=["nbval-check-output"]
print("C had", len(received["C"]), "tokens when it went")
print(
    "steps with C in them:", sum(row.seq_id == 2 for t in engine.history for row in t.rows)
)
assert engine.cache.num_free_blocks == 256
print("blocks that C still holds:", 256 - engine.cache.num_free_blocks)

# %% [markdown]
# ### Exercise 5.1: reading the notes (7 points)
#
# Make a table with five rows: a client that arrived, one that departed while its sequence was in the scheduler's waiting list,
# one that departed in the middle of its answer, one that departed after its last token, and one that arrived and departed between
# the same two steps. For each of them: is there a `seq` already? Is the client in `clients`? Does its sequence still run? In
# which order must the two lists be read?

# %%
viz.show_task(ch05.AsyncEngine.read_notes)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch05.AsyncEngine.read_notes)

# %% [markdown]
# And the four clients of the beginning? The same prompts, the same arrivals, one shared engine:


# %%
async def come_and_read(shared, number):
    await asyncio.sleep(0.02 * number)
    arrived = time.perf_counter()
    times = [
        time.perf_counter() - arrived async for _ in shared.stream(prompts[number % 4], 60)
    ]
    return times[0], times[-1]


async with shared_by_all(new_engine(model)) as shared:
    together = await asyncio.gather(*(come_and_read(shared, number) for number in range(4)))
report(together)
worst = [max(first for first, _ in times) for times in (one_by_one, together)]
print(
    f"longest wait for a first token: {worst[0] * 1e3:.0f} ms before, {worst[1] * 1e3:.0f} ms now"
)

# %% [markdown]
# The first token now comes one or two steps after the client. The clients that waited for earlier calls before have their last
# token earlier, too. The first client pays for it: it shares its steps now, and a step with more rows takes longer.
#
# ## A client that does not read
#
# > **Predict.** Two clients ask for 40 tokens each. One of them takes a single token and then nothing more, but its connection
# > stays open. What happens to the tokens of the other client?

# %% tags=["nbval-check-output"]
engine = new_engine(model)
async with shared_by_all(engine) as shared:
    lazy = shared.stream(prompts[0], 40)
    await anext(lazy)
    [stalled] = shared.clients.values()
    eager = [token_id async for token_id in shared.stream(prompts[1], 40)]
    while shared.clients:
        await asyncio.sleep(0.001)
    waiting = stalled.tokens.qsize()
    rest = [token_id async for token_id in lazy]
assert [eager] == ch04.generate(model, [prompts[1]], 40)
print(f"the client that reads has {len(eager)} tokens")
print(f"the client that does not has 1, and {waiting} items are in its token queue")
print(f"when it reads on, it has {len(rest)} more tokens, without waiting")

# %% [markdown]
# <details><summary><b>If you said that they stop, or come slowly</b></summary>
#
# They would if the loop *waited* for a reader. It does not: `put_nowait` puts an item into the token queue and returns
# immediately. The text of the stalled client is computed to its end, and 39 tokens and the closing `None` are in its token queue.
# </details>
#
# <details><summary><b>If you said that only the stalled client is computed later</b></summary>
#
# The engine does not slow it down: its sequence is in every step as before. It finishes, its *blocks* are free again, and what
# remains is a token queue of small integers. It needs no limit here, because the number of tokens that were asked for limits it.
# (Over HTTP it is the same. When the connection takes no more, the server takes no more items from the token queue, and the
# engine goes on.) A production server sets a smaller limit and says what happens beyond it.
# </details>

# %% [markdown]
# ### Exercise 5.2: delivering tokens (6 points)
#
# Each client has a token queue. After a step the loop puts items in, and the client takes them out. A group is what one step
# computed, with an *entry* for each sequence. Suppose it holds a decode of A, the last chunk of B's prompt, and the first 50 of
# 120 prompt tokens of C. Which clients get a token? Which fields of an entry say so, and where in its sequence does the new token
# stand?

# %%
viz.show_task(ch05.AsyncEngine.deliver)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch05.AsyncEngine.deliver)

# %% [markdown]
# ## The lost wake-up
#
# When there is nothing to compute, `run` sleeps until the event `note` is set. At some point of each round it has to clear the
# event, or it would never sleep.
#
# > **Predict.** Suppose it clears the event when the step has ended, just before it sleeps. Most runs would look the same.
# > Which client would lose something, and what?
#
# The result depends on an order of events that is rare in a test. So we do not wait for it. We run the same three actions in two
# orders. Client B writes its note during an empty step, one that finds nothing to compute.


# %% tags=["nbval-check-output"]
def play(order):
    note, arrived = asyncio.Event(), []
    for action in order:
        if action == "clear the event":
            note.clear()
        elif action == "read the notes":
            arrived.clear()
        elif action == "step: nothing to do, and meanwhile B comes":
            arrived.append("B")
            note.set()
        print(
            f"  {action:44} unread {arrived!s:6} event {'set' if note.is_set() else 'clear'}"
        )
    print(
        "  sleeps until the event is set:",
        "goes on immediately" if note.is_set() else "sleeps beside an unread note",
    )


print("cleared before the notes are read")
play(["clear the event", "read the notes", "step: nothing to do, and meanwhile B comes"])
print("cleared after the step")
play(["read the notes", "step: nothing to do, and meanwhile B comes", "clear the event"])

# %% [markdown]
# <details><summary><b>If you said that B's note is lost</b></summary>
#
# The note is not lost: it is still in `arrived`. The *wake-up* is lost. The loop sleeps beside an unread note, and B waits. If
# another client arrives, the event is set and both notes are read, and nothing shows later why B waited so long. On a quiet
# server B waits forever.
# </details>
#
# <details><summary><b>If you said that nothing is lost, since the loop looks at the notes again anyway</b></summary>
#
# It does after a step that computed something. With other clients in the engine there is always a next round, so the mistake
# stays hidden while the server is busy. It shows on an idle server, when a client arrives during an empty step.
# </details>
#
# The rule for every signal of this kind: *the clear must come before the `await` during which something can arrive*, here before
# the step. What arrives later sets the signal again. If there is no `await` between the clear and the reading, their order does
# not matter, because no other coroutine runs between the two. If there is one, clear the signal first, then read.

# %% [markdown]
# ### Exercise 5.3: the loop (8 points)
#
# Look at the picture of the lanes again. At each black line, where notes are read, and in each box: which line of your code is
# running? Then go through three moments: a note is written during a step that computes something, during a step that finds nothing
# to do, and while the loop sleeps. Finally let the step raise an exception. Which clients wait for a token at that moment, and in
# which lists are they?
#
# A cancellation is no failure. `asyncio.CancelledError` is a `BaseException` and no `Exception`, so `except Exception` lets it
# pass.

# %%
viz.show_task(ch05.AsyncEngine.run)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch05.AsyncEngine.run)

# %% [markdown]
# ## One client's stream
#
# A client calls `stream` and reads its tokens with `async for`, as in the runs above. The stream writes a note to `arrived`,
# takes items out of the client's token queue, and yields the tokens. Apart from `check_request` it does not touch the engine,
# because a step may be running.
#
# However the stream ends, it writes a note to `departed`. Without it the sequence of a client that has gone would be computed to
# its end, and its blocks would not be free before. Two properties of generators matter here. Calling `stream` runs none of its
# code, so a stream from which nothing is read writes no note. And if a reader goes away, an exception is raised inside the
# generator: `GeneratorExit` at a `yield`, or `asyncio.CancelledError` at an `await`.

# %% [markdown]
# ### Exercise 5.4: one client's stream (9 points)
#
# Three kinds of items can come out of the token queue. List them, and what your generator does with each. Then list the ways in
# which it can end: the text is complete, the reader closes the generator at a `yield`, the task is cancelled while it waits, the
# engine fails. Some code has to run in all four.

# %%
viz.show_task(ch05.AsyncEngine.stream)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch05.AsyncEngine.stream)

# %% [markdown]
# ## Behind HTTP
#
# `POST /generate` checks the request, and streams what `AsyncEngine.stream` yields as *server-sent events*: lines of text that
# begin with `data: `, in a response that stays open. `GET /health` gives the number of clients and of free blocks.

# %%
viz.show_source(ch05.create_app, ch05.GenerateBody)

# %% [markdown]
# Now a real server, on a free port of this machine, in a thread of this notebook. It serves the model in double precision,
# because its logits are compared with those of Hugging Face below.

# %%
computed = {}


def keep_logits(seq_id, scores):
    computed.setdefault(seq_id, []).append(scores)


served = new_engine(exact, on_logits=keep_logits)
listener = socket.socket()
listener.bind(("127.0.0.1", 0))  # port 0: any that is free
app = ch05.create_app(served, tokenizer)
server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
serving.start()
while not server.started:
    await asyncio.sleep(0.01)
web = httpx.AsyncClient(
    base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60
)
print((await web.get("/health")).json())

# %% [markdown]
# Three clients at the same time. Each piece of text is noted when it arrives, after the name of its client.


# %%
async def read_events(prompt, max_new_tokens):
    """The events of one request, as they come over the network."""
    body = {"prompt": prompt, "max_new_tokens": max_new_tokens}
    async with web.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


stories = {}


async def listen(name, prompt):
    story = stories[name] = {"tokens": [], "text": prompt}
    async for item in read_events(prompt, 30):
        story["text"] += item["text"]
        if item["token_id"] is not None:
            story["tokens"].append(item["token_id"])
            pieces.append(f"{name}{item['text']!r}")


pieces = []
await asyncio.gather(
    *(listen(name, start) for name, start in zip("ABC", starts, strict=False))
)
lines = [" ".join(pieces[first : first + 9]) for first in range(0, len(pieces), 9)]
print(*lines, f"{len(pieces)} pieces", sep="\n")

# %% [markdown]
# Each step brings a token for every client in it. The pieces may arrive in another order than A, B, C, because server, engine and
# all three clients share one process here. The whole texts:

# %% tags=["nbval-check-output"]
for name, story in stories.items():
    print(f"{name}: {story['text']!r}")

# %% [markdown]
# ### Is that what Hugging Face would have written?
#
# The three texts came in small pieces, from steps that were shared. The tokens must be those of chapter 04's `generate`, where
# all requests arrive together, and those of Hugging Face, where each request is alone. And the logits that the *server*
# computed must be those of Hugging Face, to nine digits.

# %% tags=["nbval-check-output"]
streamed = [story["tokens"] for story in stories.values()]
assert streamed == ch04.generate(exact, prompts[:3], 30)

logits = {}  # by the tokens they gave: the network decides which request came first
for scores in map(torch.stack, computed.values()):
    logits[tuple(scores.argmax(-1).tolist())] = scores
for prompt, tokens in zip(prompts, streamed, strict=False):
    theirs = exact.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)
    assert prompt + tokens == theirs[0].tolist()
    with torch.no_grad():
        their_logits = exact(theirs).logits[0, len(prompt) - 1 : -1]
    assert torch.allclose(logits[tuple(tokens)], their_logits, atol=1e-9, rtol=0)
print(f"over HTTP: {sum(map(len, streamed))} tokens and their logits equal")

# %% [markdown]
# ## A client closes its connection
#
# One client stays for its 30 tokens. Another asks for 200 and closes the connection after five. The client sends no message to
# the engine. The server notices the closed connection and cancels the response. That closes the generator, and its `finally`
# writes the note. `/health` shows whether the blocks are free again.

# %%
before = (await web.get("/health")).json()
first_step = len(served.history)


async def stay():
    return [item async for item in read_events(starts[0], 30)]


async def leave_early():
    async with aclosing(read_events(starts[1], 200)) as pieces:
        for _ in range(5):
            await anext(pieces)
        return (await web.get("/health")).json()  # and the response is closed


_, during = await asyncio.gather(stay(), leave_early())
for _ in range(500):
    after = (await web.get("/health")).json()
    if after["clients"] == 0 and after["free_blocks"] == before["free_blocks"]:
        break
    await asyncio.sleep(0.01)
for moment, health in (("before", before), ("during", during), ("after", after)):
    print(f"{moment:6} {health}")
assert (after["clients"], after["free_blocks"]) == (0, 256) == (0, before["free_blocks"])
assert during["free_blocks"] < 256

# %%
visit_traces = served.history[first_step:]
who = {len(prompts[0]): "stays", len(prompts[1]): "leaves"}
labels = {
    row.seq_id: who[row.num_tokens]
    for trace in visit_traces
    for row in trace.rows
    if row.start == 0
}
viz.timeline(visit_traces, names=labels)

# %% [markdown]
# The letters count the server's sequences. A, B and C were the three clients above. D is the client that stays, and E the one that
# leaves. The axis counts all steps of the server, so it does not begin at 0: the earlier steps are those of A, B and C.
#
# The row of the client that departed stops. There is no black bar at its end, because no step *ended* this text: `read_notes`
# ended it between two steps. It was in at least one step more than the five whose tokens were read, because the server has to
# notice a closed connection before there is a note. The other row goes on unchanged.
#
# That was the last request. We close the server; otherwise it would run until the kernel ends.

# %% tags=["nbval-check-output"]
await web.aclose()
server.should_exit = True
await asyncio.to_thread(serving.join, 20)
listener.close()
print("still serving:", serving.is_alive())

# %% [markdown]
# When the tasks pass, serve with your own code: `python -m work.ch05_server`, from the folder that holds `work/`. (If port 8000
# is in use, add `--port 8001`, and write 8001 below.) In another terminal, ask for a story. Then ask again, and close the
# connection after a tenth of a second:
#
# ```
# curl -N http://127.0.0.1:8000/generate -H "Content-Type: application/json" -d '{"prompt": "One day", "max_new_tokens": 500}'
# curl -N --max-time 0.1 http://127.0.0.1:8000/generate -H "Content-Type: application/json" -d '{"prompt": "One day"}'
# curl http://127.0.0.1:8000/health
# ```
#
# The last line should say that there are 0 clients and that all 256 blocks are free.

# %% [markdown]
# ## What was gained
#
# > **Predict.** One client alone gets a token every so many milliseconds. Now eight clients ask at the same moment. Does each
# > client get an eighth of the speed?
#
# We measure at `AsyncEngine.stream` itself, without HTTP, so that only engine and loop count. Each of $n$ clients asks for 24
# tokens at the same moment. *Time per token* is the time from asking to the last token, divided by the tokens: waiting
# counts. For comparison the same clients call `generate` one after the other, as at the beginning.
#
# Times as short as these vary with what else the machine does, which only ever makes a run slower. So all loads are measured in
# each of five rounds, and the table shows the fastest run of each load. Small differences between two lines mean nothing.

# %%
COUNTS, NEW, ROUNDS = (1, 2, 4, 8, 16), 24, 5


async def load(count):
    """First and last token of each of ``count`` clients, in seconds since all asked."""
    async with shared_by_all(new_engine(model)) as shared:
        began = time.perf_counter()

        async def read(number):
            tokens = shared.stream(prompts[number % 4], NEW)
            times = [time.perf_counter() - began async for _ in tokens]
            return times[0], times[-1]

        return await asyncio.gather(*map(read, range(count)))


def seconds_alone(number):
    """One blocking call."""
    began = time.perf_counter()
    ch04.generate(model, [prompts[number]], NEW)
    return time.perf_counter() - began


def point(count, first_and_last):
    """Tokens per second, seconds per token of an answer."""
    last = [last for _, last in first_and_last]
    return count * NEW / max(last), sum(last) / count / NEW


def middle(runs):
    """The run in the middle, when they are sorted by the time of their last token."""
    return sorted(runs, key=lambda run: max(last for _, last in run))[len(runs) // 2]


await load(4)  # warms the machine up
loads, alone = {count: [] for count in COUNTS}, {number: [] for number in range(4)}
for _ in range(ROUNDS):
    for count in COUNTS:
        loads[count].append(await load(count))
    for number in alone:
        alone[number].append(seconds_alone(number))

shared_runs = {count: middle(runs) for count, runs in loads.items()}
in_turn, clock = [], 0.0
for number in range(max(COUNTS)):
    clock += sorted(alone[number % 4])[ROUNDS // 2]
    in_turn.append((clock, clock))  # all tokens come together

shared_points = [point(count, shared_runs[count]) for count in COUNTS]
turn_points = [point(count, in_turn[:count]) for count in COUNTS]
print("             shared engine             |       one after the other")
print("clients  tokens/s  ms/token  ms to first  |  tokens/s  ms/token  ms to first")
for count, *points in zip(COUNTS, shared_points, turn_points, strict=True):
    columns = []
    for (speed, per_token), times in zip(
        points, (shared_runs[count], in_turn), strict=True
    ):
        first = sum(first for first, _ in times[:count]) / count
        columns.append(f"{speed:8.0f} {per_token * 1e3:9.1f} {first * 1e3:12.0f}")
    print(f"{count:7}  {columns[0]}  |  {columns[1]}")

# %%
viz.latency_throughput(
    {
        "05 shared engine": [(speed, 1e3 * seconds) for speed, seconds in shared_points],
        "one generate after the other": [(speed, 1e3 * s) for speed, s in turn_points],
    },
    latency="ms per token of an answer",
)

# %% [markdown]
# The points of a curve are 1, 2, 4, 8 and 16 clients. One after the other, throughput is the same at every load, and each further
# client makes all clients behind it wait. With a shared engine, more clients bring more tokens per second, and the time per token
# grows much more slowly than the number of clients. A single client shares nothing. It only pays for the thread that each step is
# handed to.
#
# <details><summary><b>If you said yes, an eighth</b></summary>
#
# That would be so if a step's time grew in proportion to the rows in it. But a step reads all weights of the model once, for one
# row or for eight, and calls the same number of operations. Compare the lines for 1 and 8 clients in the table: with 8
# clients, a token takes far less than eight times as long.
# </details>
#
# <details><summary><b>If you said no, each keeps its full speed</b></summary>
#
# On a GPU with a large model that is nearly true, as long as reading the weights takes most of a step. On a CPU with a small model
# it is partly true: a fixed share of each step, mostly Python and the start of operations, is paid once for all rows. The
# arithmetic, the attention over each sequence's own blocks, and the delivery of tokens grow with the number of clients.
# </details>

# %% [markdown]
# ### Exercise 5.5: measure the wait for a first token (3 points)
#
# A client that arrives at a busy server waits for its first token. Here you count the steps of this wait, instead of
# milliseconds, so that the answer is the same on every machine. Before you measure, predict the number.

# %%
viz.show_task(ch05.answer_5_5)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch05.answer_5_5)

# %% [markdown]
# ## What is still missing
#
# The engine now batches, pages, schedules, streams and frees the blocks of clients that depart. The engine in `pagebrain`, and
# vLLM, have more:
#
# - **Speed on a GPU.** Attention here is made of PyTorch operations, one after another. On a GPU it is one kernel that reads the
#   blocks in place, and CUDA graphs remove Python from the steps.
# - **A process for the engine.** Our step and our event loop are two threads of one process, and Python, in its usual build, runs
#   the code of only one of them at a time. With many connections each slows the other down. vLLM runs the engine in another
#   process.
# - **OpenAI's API.** `/generate` exists only here. Existing clients use `/v1/completions`, with sampling parameters and stop
#   strings.
# - **Limited queues.** A client that does not read costs memory, and so does each request that waits. A server must refuse
#   requests in time.
#
# All of them keep the idea of this chapter: only the step and the reading of notes change the engine, and everything else writes
# a note. `pagebrain serve` has all but the first; its notes travel between two processes
# (`pagebrain/server/link/engine_main.py` reads them, `client.py` writes them).
