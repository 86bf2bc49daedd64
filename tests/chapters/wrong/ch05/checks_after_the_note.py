"""Task 5.4: a request that could never be served is noted before it is checked, and ends the engine."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)
            self.note.set()
