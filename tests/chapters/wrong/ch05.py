"""Wrong solutions of chapter 05. ``# %%`` names each, its docstring the task and the mistake."""

# %% finishes_twice
"""Task 5.1: ends a sequence that has finished by itself a second time when its client leaves."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()


# %% forgets_those_after_a_refusal
"""Task 5.1: takes all notes out of the lists first, so clients that are not reached are forgotten."""


class AsyncEngine:
    def read_notes(self) -> None:
        arrived, self.arrived = self.arrived, []
        left, self.left = self.left, []
        for client in arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)


# %% keeps_clients_that_left
"""Task 5.1: ends the sequence of a client that left, but the client stays in ``clients``."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None and not client.seq.is_finished:
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()


# %% keeps_left_notes
"""Task 5.1: never throws the notes of who left away."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        self.arrived.clear()
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)


# %% lets_go_before_letting_in
"""Task 5.1: reads who left first, so a client that came and went between two steps is let in and never dropped."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.left.clear()
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        self.arrived.clear()


# %% lets_go_only_between_arrivals
"""Task 5.1: returns early when no request arrived, so departures wait for the next arrival."""


class AsyncEngine:
    def read_notes(self) -> None:
        if not self.arrived:
            return
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()


# %% never_ends_sequences
"""Task 5.1: forgets the client that left, but its sequence goes on in the engine and keeps its blocks."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
        self.arrived.clear()
        self.left.clear()


# %% removes_while_iterating
"""Task 5.1: takes notes off the lists while walking over them, so every second one is skipped."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
            self.arrived.remove(client)
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
            self.left.remove(client)


# %% chunks_bring_tokens
"""Task 5.2: ignores ``samples``, so each chunk of a long prompt brings the prompt's last token."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% delivers_at_the_end
"""Task 5.2: keeps all tokens back until the sequence has finished."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if entry.seq.is_finished:
                client = self.clients.pop(entry.seq.seq_id)
                for token_id in entry.seq.output_token_ids:
                    client.tokens.put_nowait(token_id)
                client.tokens.put_nowait(None)


# %% everybody_gets_a_token
"""Task 5.2: gives each client its sequence's last token after every step, also if it was not in that step."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for seq_id, client in list(self.clients.items()):
            client.tokens.put_nowait(client.seq.token_ids[-1])
            if client.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[seq_id]


# %% keeps_finished_clients
"""Task 5.2: a finished client stays in ``clients``."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)


# %% none_only_at_the_limit
"""Task 5.2: a sequence that ends early, with the end-of-text token, gets no ``None``."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if len(entry.seq.output_token_ids) == client.max_new_tokens:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% pairs_by_position
"""Task 5.2: pairs the group with ``clients`` by position instead of by sequence id."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry, client in zip(group, list(self.clients.values())):
            if not entry.samples:
                continue
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% stops_at_the_first_chunk
"""Task 5.2: a prompt's chunk ends the delivery for all sequences behind it in the group."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                return
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% cancelled_is_failed
"""Task 5.3: takes being cancelled for a failure of the engine."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except BaseException as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% delivers_in_a_thread
"""Task 5.3: delivers in a thread too, where the clients' queues must not be touched."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    await asyncio.to_thread(self.deliver, group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% ends_quietly
"""Task 5.3: keeps the failure and tells all clients, but ends as if nothing had happened."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)


# %% forgets_the_failure
"""Task 5.3: tells all clients and raises, but does not keep the exception in ``failure``."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% loses_a_wake_up
"""Task 5.3: clears the note after the step that found nothing, and with it a note left during that call."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                await self.note.wait()
                self.read_notes()
                while (group := await asyncio.to_thread(self.engine.step)) is not None:
                    self.deliver(group)
                    self.read_notes()
                self.note.clear()
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% never_clears_the_note
"""Task 5.3: never clears the note, so after the first one the loop does not sleep any more."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% reads_notes_during_a_step
"""Task 5.3: lets clients in and out while a step is under way in the thread."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                step = asyncio.ensure_future(asyncio.to_thread(self.engine.step))
                while not step.done():
                    note = asyncio.ensure_future(self.note.wait())
                    await asyncio.wait([step, note], return_when=asyncio.FIRST_COMPLETED)
                    if note.done() and not step.done():
                        self.note.clear()
                        self.read_notes()
                    note.cancel()
                group = step.result()
                if group is None and not self.clients:
                    await self.note.wait()
                elif group is not None:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% reads_notes_only_when_idle
"""Task 5.3: computes until nothing is left to do before it reads the notes again."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                while (group := await asyncio.to_thread(self.engine.step)) is not None:
                    self.deliver(group)
                await self.note.wait()
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% steps_on_the_event_loop
"""Task 5.3: computes the step on the event loop, where all other coroutines wait for it."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = self.engine.step()
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
                    await asyncio.sleep(0)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% tells_only_who_was_let_in
"""Task 5.3: a client that arrived while the failing step ran waits forever."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in self.clients.values():
                client.tokens.put_nowait(error)
            raise


# %% a_failure_looks_like_the_end
"""Task 5.4: a failed step ends the stream like a last token."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while isinstance(token := await client.tokens.get(), int):
                yield token
        finally:
            self.left.append(client)
            self.note.set()


# %% adds_the_request_itself
"""Task 5.4: hands the request to the engine at once, also while a step is under way."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        client.seq = self.engine.add_request(prompt, max_new_tokens)
        self.clients[client.seq.seq_id] = client
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)
            self.note.set()


# %% checks_after_the_note
"""Task 5.4: a request that could never be served is noted before it is checked, and ends the engine."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)
            self.note.set()


# %% collects_before_it_yields
"""Task 5.4: waits for all tokens before it yields the first."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            tokens = []
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                tokens.append(token)
            for token in tokens:
                yield token
        finally:
            self.left.append(client)
            self.note.set()


# %% ends_the_sequence_itself
"""Task 5.4: ends its sequence in the engine at once, also while a step is under way."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            if client.seq is None:
                self.arrived.remove(client)
            elif not client.seq.is_finished:
                del self.clients[client.seq.seq_id]
                self.engine.finish(client.seq)
            self.note.set()


# %% leaves_only_at_the_end
"""Task 5.4: the note that the client left stands after the loop, so a cancelled reader leaves none."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        while (token := await client.tokens.get()) is not None:
            if isinstance(token, Exception):
                raise EngineFailedError("a step failed") from token
            yield token
        self.left.append(client)
        self.note.set()


# %% leaves_only_when_cancelled
"""Task 5.4: leaves a note when the reader is cancelled while it waits, but not when the generator is closed."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        except asyncio.CancelledError:
            self.left.append(client)
            self.note.set()
            raise
        self.left.append(client)
        self.note.set()


# %% leaves_only_when_closed
"""Task 5.4: leaves a note when the generator is closed, but not when the reader is cancelled while it waits."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        except GeneratorExit:
            self.left.append(client)
            self.note.set()
            raise
        self.left.append(client)
        self.note.set()


# %% leaves_without_a_sign
"""Task 5.4: the note that the client left lies there, but the event is not set."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)


# %% loses_the_cause
"""Task 5.4: the ``EngineFailedError`` does not say which exception caused it."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped")
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed")
                yield token
        finally:
            self.left.append(client)
            self.note.set()


# %% swallows_the_cancellation
"""Task 5.4: a cancelled reader is not cancelled: its stream just ends."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        except asyncio.CancelledError:
            pass
        finally:
            self.left.append(client)
            self.note.set()


# %% waits_for_a_failed_engine
"""Task 5.4: does not look at ``failure``: a client that comes after the end of the engine waits forever."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)
            self.note.set()
