"""Wrong solutions of chapter 05. ``# %%`` names each, its docstring the task and the mistake."""

# %% departure_must_be_in_clients
"""Task 5.1: deletes without asking, so a departure after the last token raises."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                del self.clients[client.seq.seq_id]
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% drops_departures_if_an_arrival_is_refused
"""Task 5.1: takes the departures off their list before the arrivals are read, and keeps them only if ending one fails."""


class AsyncEngine:
    def read_notes(self) -> None:
        departures, self.departed = self.departed, []
        while self.arrived:
            client = self.arrived[0]
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
            self.arrived.pop(0)
        try:
            for client in departures:
                if client.seq is not None:
                    self.clients.pop(client.seq.seq_id, None)
                    if not client.seq.is_finished:
                        self.engine.finish(client.seq)
        except Exception:
            self.departed = departures
            raise


# %% ends_running_sequences_only
"""Task 5.1: ends a sequence only while its status is running, not while it waits after a preemption."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if client.seq.num_computed or client.seq.status.name == "WAITING":
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% finishes_twice
"""Task 5.1: ends a sequence that has finished by itself a second time when its client departs."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% first_sequence_never_leaves
"""Task 5.1: takes sequence id 0 for no sequence."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            seq_id = client.seq.seq_id if client.seq is not None else None
            if seq_id:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% forgets_those_after_a_refusal
"""Task 5.1: takes all notes out of the lists first, so clients that are not reached are forgotten."""


class AsyncEngine:
    def read_notes(self) -> None:
        arrived, self.arrived = self.arrived, []
        departed, self.departed = self.departed, []
        for client in arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)


# %% gives_blocks_back_only
"""Task 5.1: gives the blocks back, and the sequence stays in the scheduler."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.cache.retire(client.seq)
                    client.seq.status = data.SequenceStatus.FINISHED
        self.arrived.clear()
        self.departed.clear()


# %% keeps_clients_that_left
"""Task 5.1: ends the sequence of a client that departed, but the client stays in ``clients``."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None and not client.seq.is_finished:
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% keeps_departures
"""Task 5.1: never throws the notes of departures away."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        self.arrived.clear()
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)


# %% last_come_first_served
"""Task 5.1: lets the latest arrival in first."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in reversed(self.arrived):
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% lets_go_before_letting_in
"""Task 5.1: reads the departures first, so a client that came and departed between two steps is added and never ended."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.departed.clear()
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
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% loses_departures_if_one_fails
"""Task 5.1: throws the departures away before they were acted on: if ``finish`` fails, the others are lost."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        departed, self.departed = self.departed, []
        for client in departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()


# %% never_ends_sequences
"""Task 5.1: forgets the client that departed, but its sequence goes on in the engine and keeps its blocks."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
        self.arrived.clear()
        self.departed.clear()


# %% one_departure_at_a_time
"""Task 5.1: acts on one departure at each reading; a second one waits for the next."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        if self.departed:
            client = self.departed.pop(0)
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()


# %% pops_after_looking_at_the_sequence
"""Task 5.1: keeps the departures that it has not reached, but not the one whose sequence could not be ended."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        self.arrived.clear()
        departures, self.departed = self.departed, []
        for number, client in enumerate(departures):
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    try:
                        self.engine.finish(client.seq)
                    except Exception:
                        self.departed = departures[number + 1 :]
                        raise


# %% pops_before_it_adds
"""Task 5.1: takes each note off the list before it is acted on, so a refused client is lost."""


class AsyncEngine:
    def read_notes(self) -> None:
        while self.arrived:
            client = self.arrived.pop(0)
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.departed.clear()


# %% pops_before_it_ends
"""Task 5.1: takes each departure off the list before its sequence was ended, so the one in hand is lost if that fails."""


class AsyncEngine:
    def read_notes(self) -> None:
        while self.arrived:
            client = self.arrived[0]
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
            self.arrived.pop(0)
        while self.departed:
            client = self.departed.pop(0)
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)


# %% removes_while_iterating
"""Task 5.1: takes notes off the lists while walking over them, so every second one is skipped."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
            self.arrived.remove(client)
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
            self.departed.remove(client)


# %% skips_every_second_departure
"""Task 5.1: takes departures off the list while it walks over them."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
            self.departed.remove(client)
        self.arrived.clear()


# %% swallows_a_refusal
"""Task 5.1: goes on after a refusal of ``add_request`` and throws the note away: that client waits forever."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            try:
                client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            except Exception:
                continue
            self.clients[client.seq.seq_id] = client
        for client in self.departed:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.departed.clear()


# %% all_clients_get_a_token
"""Task 5.2: gives each client its sequence's last token after every step, also if it was not in that step."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for seq_id, client in list(self.clients.items()):
            client.tokens.put_nowait(client.seq.token_ids[-1])
            if client.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[seq_id]


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


# %% drops_what_is_not_read
"""Task 5.2: gives a client a token only when the one before was read."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            if client.tokens.empty():
                client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% end_by_count_of_queue
"""Task 5.2: sends the end when the limit of the sequence is reached, not when it has finished."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if len(entry.seq.token_ids) >= entry.seq.max_num_tokens:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% finished_twice
"""Task 5.2: removes all finished clients after the first entry, and looks for them again."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                self.clients.clear()


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


# %% keeps_the_end_token
"""Task 5.2: does not deliver the end-of-text token."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            if entry.seq.token_ids[-1] != self.engine.model.config.eos_token_id:
                client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% last_chunks_bring_nothing
"""Task 5.2: takes every chunk that does not begin a prompt for one with more to come."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples or (entry.start > 0 and entry.num_tokens > 1):
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% newest_by_count_of_prompt
"""Task 5.2: takes the token behind the client's prompt each time: always the first."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[len(client.prompt)])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


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


# %% output_means_sampled
"""Task 5.2: looks for output tokens instead of ``samples``: chunks of a resumed sequence bring a token again."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.seq.output_token_ids:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
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


# %% past_the_prompt_means_sampled
"""Task 5.2: compares the context with the prompt, not with all tokens of a resumed sequence."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if entry.context_len < entry.seq.num_prompt_tokens:
                continue
            client = self.clients[entry.seq.seq_id]
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


# %% token_zero_is_no_token
"""Task 5.2: takes token id 0 for no token."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            if token := entry.seq.token_ids[-1]:
                client.tokens.put_nowait(token)
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]


# %% arrivals_only_wake
"""Task 5.3: sleeps on until a client arrives: a departure does not wake it."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    while not self.arrived:
                        await self.note.wait()
                        if not self.arrived:
                            self.note.clear()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% blocks_while_idle
"""Task 5.3: blocks the event loop for a moment when there is nothing to do."""

import time


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    time.sleep(0.02)
                    await asyncio.sleep(0)
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


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


# %% clears_after_looking_at_arrivals
"""Task 5.3: clears the event after the empty step unless a client arrived: a departure is overlooked."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    if not self.arrived:
                        self.note.clear()
                        await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% deliver_is_not_guarded
"""Task 5.3: a failure in ``deliver`` reaches no client."""


class AsyncEngine:
    async def run(self) -> None:
        while True:
            try:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
            except Exception as error:
                self.failure = error
                for client in [*self.clients.values(), *self.arrived]:
                    client.tokens.put_nowait(error)
                raise
            if group is None:
                await self.note.wait()
            else:
                self.deliver(group)


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


# %% gives_up_on_a_long_step
"""Task 5.3: a step that takes longer than a second is taken for a failure."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.wait_for(asyncio.to_thread(self.engine.step), 1)
                if group is None:
                    await self.note.wait()
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% loses_a_wake_up
"""Task 5.3: clears the note after the step that found nothing, and with it a note written during that call."""


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


# %% polls_the_engine
"""Task 5.3: asks the engine again each second instead of sleeping until there is a note."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await asyncio.sleep(1)
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% polls_the_note
"""Task 5.3: looks at the event again and again instead of waiting for it."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    while not self.note.is_set():
                        await asyncio.sleep(0.01)
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% reads_notes_during_a_step
"""Task 5.3: acts on notes while a step is under way in the thread."""


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
"""Task 5.3: computes until there is nothing more to do before it reads the notes again."""


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


# %% rests_between_steps
"""Task 5.3: rests after every step, also when there is more to compute."""


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
                    await asyncio.sleep(0.001)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% returns_when_cancelled
"""Task 5.3: returns quietly when it is cancelled."""


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
        except asyncio.CancelledError:
            return
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% sleeps_after_every_step
"""Task 5.3: waits for a note after every step, also if there is more to compute."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is not None:
                    self.deliver(group)
                if not self.clients:
                    await self.note.wait()
                else:
                    await asyncio.sleep(0)
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


# %% tells_text_instead_of_the_exception
"""Task 5.3: puts a new exception into the queues instead of the one that was raised."""


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
                client.tokens.put_nowait(RuntimeError(str(error)))
            raise


# %% tells_the_end
"""Task 5.3: puts ``None`` into the queues when a step fails."""


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
                client.tokens.put_nowait(None)
            raise


# %% wait_with_a_timeout
"""Task 5.3: wakes up each second without a note."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    try:
                        await asyncio.wait_for(self.note.wait(), 1)
                    except asyncio.TimeoutError:
                        pass
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise


# %% sleeps_if_it_has_no_clients
"""Task 5.3: sleeps as soon as ``clients`` is empty, without a step that gives ``None``."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                if not self.clients:
                    await self.note.wait()
                    continue
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


# %% waits_in_a_thread
"""Task 5.3: a thread polls the lists while the loop is idle."""

import time


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                group = await asyncio.to_thread(self.engine.step)
                if group is None:
                    await asyncio.to_thread(self.until_noted)
                else:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise

    def until_noted(self) -> None:
        while not self.note.is_set():
            time.sleep(0.01)


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
            self.departed.append(client)
            self.note.set()


# %% adds_the_request_itself
"""Task 5.4: hands the request to the engine immediately, also while a step is under way."""


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
            self.departed.append(client)
            self.note.set()


# %% arrives_before_it_is_read
"""Task 5.4: writes its note when it is called, so a stream that is never read arrives and never departs."""


class AsyncEngine:
    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        return self.tokens_of(client)

    async def tokens_of(self, client: Client) -> AsyncGenerator[int, None]:
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
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
            self.departed.append(client)
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
            self.departed.append(client)
            self.note.set()


# %% counts_instead_of_the_end
"""Task 5.4: counts tokens and does not look for ``None``: an answer that ends early never ends."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            received = 0
            while received < max_new_tokens:
                token = await client.tokens.get()
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                if token is not None:
                    received += 1
                    yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% end_token_ends_the_stream
"""Task 5.4: the end-of-text token ends the stream and is not handed on."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) not in (None, self.engine.model.config.eos_token_id):
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% ends_after_a_second
"""Task 5.4: ends quietly if a token takes longer than a second."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while True:
                try:
                    token = await asyncio.wait_for(client.tokens.get(), 1.0)
                except asyncio.TimeoutError:
                    return
                if token is None:
                    return
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% ends_the_sequence_itself
"""Task 5.4: ends its sequence in the engine immediately, also while a step is under way."""


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


# %% finishes_and_leaves
"""Task 5.4: ends its sequence in the engine immediately, and writes the note as well."""


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
            if client.seq is not None and not client.seq.is_finished:
                self.engine.finish(client.seq)
            self.departed.append(client)
            self.note.set()


# %% gives_up_after_a_second
"""Task 5.4: gives up if a token takes longer than a second."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await asyncio.wait_for(client.tokens.get(), 1)) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% holds_one_token_back
"""Task 5.4: hands a token on only when the next one is there."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            before = await client.tokens.get()
            while before is not None:
                if isinstance(before, Exception):
                    raise EngineFailedError("a step failed") from before
                after = await client.tokens.get()
                yield before
                before = after
        finally:
            self.departed.append(client)
            self.note.set()


# %% jumps_the_queue
"""Task 5.4: puts its note in front of those of earlier clients."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.insert(0, client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% leaves_clients_itself
"""Task 5.4: takes its client out of ``clients`` itself, where a step under way still has tokens for it."""


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
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
            self.departed.append(client)
            self.note.set()


# %% leaves_only_at_the_end
"""Task 5.4: the note of the departure stands after the loop, so a cancelled reader writes none."""


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
        self.departed.append(client)
        self.note.set()


# %% leaves_only_when_cancelled
"""Task 5.4: writes a note when the reader is cancelled while it waits, but not when the generator is closed."""


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
            self.departed.append(client)
            self.note.set()
            raise
        self.departed.append(client)
        self.note.set()


# %% leaves_only_when_closed
"""Task 5.4: writes a note when the generator is closed, but not when the reader is cancelled while it waits."""


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
            self.departed.append(client)
            self.note.set()
            raise
        self.departed.append(client)
        self.note.set()


# %% leaves_twice
"""Task 5.4: writes its note twice if the reader goes away early."""


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
        except BaseException:
            self.departed.append(client)
            raise
        finally:
            self.departed.append(client)
            self.note.set()


# %% leaves_without_a_sign
"""Task 5.4: the note of the departure lies there, but the event is not set."""


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
            self.departed.append(client)


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
            self.departed.append(client)
            self.note.set()


# %% no_departure_from_a_failed_engine
"""Task 5.4: writes no note of its departure when the engine fails."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        failed = False
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    failed = True
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            if not failed:
                self.departed.append(client)
                self.note.set()


# %% polls_its_queue
"""Task 5.4: looks into its queue again and again."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while True:
                while client.tokens.empty():
                    await asyncio.sleep(0.001)
                token = client.tokens.get_nowait()
                if token is None:
                    break
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% reads_the_notes_itself
"""Task 5.4: reads the notes itself when its reader departs, also while a step is under way."""


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
            self.departed.append(client)
            self.note.set()
            self.read_notes()


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
            self.departed.append(client)
            self.note.set()


# %% takes_its_arrival_back
"""Task 5.4: takes its own note out of ``arrived`` where it is unread, in place of a note in ``departed``."""


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
            if client in self.arrived:
                self.arrived.remove(client)
            else:
                self.departed.append(client)
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
            self.departed.append(client)
            self.note.set()


# %% writes_over_other_departures
"""Task 5.4: replaces the list of departures by its own note."""


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
            self.departed = [client]
            self.note.set()


# %% writes_over_other_notes
"""Task 5.4: replaces the list of arrivals by its own note."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived = [client]
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.departed.append(client)
            self.note.set()


# %% counts_a_step_after_the_token
"""Task 5.5: counts the step after the one that samples the first token as well."""


def answer_5_5() -> tuple[float, str]:
    return 8, "The step that is computing ends first, then the prompt is computed in chunks of the budget, step by step."


# %% explains_nothing
"""Task 5.5: gives the number without an explanation."""


def answer_5_5() -> tuple[float, str]:
    return 7, "Seven steps."


# %% forgets_the_step_under_way
"""Task 5.5: does not count the step that is computing when the note is written."""


def answer_5_5() -> tuple[float, str]:
    return 6, "The step that is computing ends first, then the prompt is computed in chunks of the budget, step by step."


# %% whole_prompt_in_one_step
"""Task 5.5: takes the prefill for one step."""


def answer_5_5() -> tuple[float, str]:
    return 2, "The step that is computing ends first, then the prompt is computed in chunks of the budget, step by step."
