"""Task 5.3: computes the step on the event loop, where everybody else waits for it."""


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
