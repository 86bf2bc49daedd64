"""Task 5.3: tells everybody and raises, but does not keep the exception in ``failure``."""


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
