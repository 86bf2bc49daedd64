"""Task 5.1: swaps the lists of notes for new ones, computes in an executor, and sleeps before it clears the note."""


class AsyncEngine:
    def read_notes(self) -> None:
        arrived = list(self.arrived)
        for client in arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
        gone = set(self.departed)
        for client in self.departed:
            if client.seq is not None and not client.seq.is_finished:
                self.engine.finish(client.seq)
        served = [client for client in [*self.clients.values(), *arrived] if client not in gone]
        self.clients = {client.seq.seq_id: client for client in served}
        self.arrived, self.departed = [], []

    def deliver(self, group: SequenceGroup) -> None:
        sampled = {entry.seq.seq_id: entry.seq for entry in group if entry.samples}
        for seq_id, client in list(self.clients.items()):
            if seq_id in sampled:
                client.tokens.put_nowait(sampled[seq_id].output_token_ids[-1])
                if sampled[seq_id].is_finished:
                    client.tokens.put_nowait(None)
                    self.clients = {other: waits for other, waits in self.clients.items() if other != seq_id}

    async def run(self) -> None:
        event_loop = asyncio.get_running_loop()
        try:
            while True:
                self.read_notes()
                group = await event_loop.run_in_executor(None, self.engine.step)
                if group is not None:
                    self.deliver(group)
                    continue
                await self.note.wait()
                self.note.clear()  # the notes are read next, before anything is awaited
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.failure = error
            waiting = set(self.clients.values()).union(self.arrived)
            for client in waiting:
                client.tokens.put_nowait(error)
            raise

    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure:
            raise EngineFailedError(str(self.failure)) from self.failure
        client = Client(prompt, max_new_tokens)
        try:
            self.arrived.append(client)
            self.note.set()
            token: int | Exception | None = await client.tokens.get()
            while isinstance(token, int):
                yield token
                token = await client.tokens.get()
            if token is not None:
                raise EngineFailedError(str(token)) from token
        finally:
            self.departed.append(client)
            self.note.set()
