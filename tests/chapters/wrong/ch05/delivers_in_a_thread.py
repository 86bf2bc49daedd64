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
