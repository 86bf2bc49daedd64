"""Task 5.3: clears the note after the step that found nothing, and with it a note left during that call."""


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
