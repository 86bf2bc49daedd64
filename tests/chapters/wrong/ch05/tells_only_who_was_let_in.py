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
