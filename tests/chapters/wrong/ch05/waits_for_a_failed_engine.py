"""Task 5.4: does not look at ``failure``: whoever comes after the end of the engine waits forever."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            self.left.append(client)
            self.note.set()
