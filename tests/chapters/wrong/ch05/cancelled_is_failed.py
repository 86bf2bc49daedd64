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
