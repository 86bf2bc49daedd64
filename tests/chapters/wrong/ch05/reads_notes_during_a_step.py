"""Task 5.3: lets clients in and out while a step is under way in the thread."""


class AsyncEngine:
    async def run(self) -> None:
        try:
            while True:
                self.note.clear()
                self.read_notes()
                step = asyncio.ensure_future(asyncio.to_thread(self.engine.step))
                while not step.done():
                    note = asyncio.ensure_future(self.note.wait())
                    await asyncio.wait([step, note], return_when=asyncio.FIRST_COMPLETED)
                    if note.done() and not step.done():
                        self.note.clear()
                        self.read_notes()
                    note.cancel()
                group = step.result()
                if group is None and not self.clients:
                    await self.note.wait()
                elif group is not None:
                    self.deliver(group)
        except Exception as error:
            self.failure = error
            for client in [*self.clients.values(), *self.arrived]:
                client.tokens.put_nowait(error)
            raise
