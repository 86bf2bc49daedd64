"""Task 5.4: the ``EngineFailedError`` does not say which exception caused it."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped")
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed")
                yield token
        finally:
            self.left.append(client)
            self.note.set()
