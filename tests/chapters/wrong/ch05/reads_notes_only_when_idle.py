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
