"""Task 5.4: a failed step ends the stream like a last token."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while isinstance(token := await client.tokens.get(), int):
                yield token
        finally:
            self.left.append(client)
            self.note.set()
