"""Task 5.3: wakes up by a flag at the top of the loop, drains the notes from the front, fails in a helper."""


class AsyncEngine:
    def read_notes(self) -> None:
        while self.arrived:
            client = self.arrived[0]
            seq = client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[seq.seq_id] = client
            del self.arrived[0]
        while self.departed:
            seq = self.departed[0].seq
            if seq is not None:
                if seq.seq_id in self.clients:
                    del self.clients[seq.seq_id]
                if not seq.is_finished:
                    self.engine.finish(seq)
            del self.departed[0]

    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if entry.samples:
                tokens = self.clients[entry.seq.seq_id].tokens
                for token_id in entry.seq.token_ids[entry.context_len :]:  # exactly one
                    tokens.put_nowait(token_id)
        for seq_id in [entry.seq.seq_id for entry in group if entry.seq.is_finished]:
            self.clients.pop(seq_id).tokens.put_nowait(None)

    async def run(self) -> None:
        idle = False
        while True:
            try:
                if idle:
                    await self.note.wait()
                self.read_notes()
                self.note.clear()  # nothing was awaited since the notes were read
                group = await asyncio.to_thread(self.engine.step)
                idle = group is None
                if group is not None:
                    self.deliver(group)
            except Exception as error:
                self.fail(error)
                raise

    def fail(self, error: Exception) -> None:
        self.failure = error
        while self.clients:
            self.clients.popitem()[1].tokens.put_nowait(error)
        while self.arrived:
            self.arrived.pop().tokens.put_nowait(error)

    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("no more requests") from self.failure
        self.arrived.append(client := Client(prompt, max_new_tokens))
        self.note.set()
        try:
            while True:
                match await client.tokens.get():
                    case None:
                        break
                    case Exception() as error:
                        raise EngineFailedError(f"a step failed: {error}") from error
                    case token_id:
                        yield token_id
        except BaseException:
            self.depart(client)
            raise
        else:
            self.depart(client)

    def depart(self, client: Client) -> None:
        self.departed.append(client)
        self.note.set()
