"""Task 5.3: sleeps before its first step, and adds no client that has departed already."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            if client not in self.departed:
                client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
                self.clients[client.seq.seq_id] = client
        for seq in [client.seq for client in self.departed if client.seq is not None]:
            self.clients.pop(seq.seq_id, None)
            if not seq.is_finished:
                self.engine.finish(seq)
        self.arrived, self.departed = [], []

    async def run(self) -> None:
        while True:
            await self.note.wait()
            while await self.round():
                pass

    async def round(self) -> bool:
        try:
            self.note.clear()
            self.read_notes()
            group = await asyncio.to_thread(self.engine.step)
            if group is not None:
                self.deliver(group)
            return group is not None
        except Exception as error:
            self.failure = error
            for client in (*self.arrived, *self.clients.values()):
                client.tokens.put_nowait(error)
            raise
