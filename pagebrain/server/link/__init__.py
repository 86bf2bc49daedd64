"""The server's link to the engine: streams and admission in front, the engine's process and its messages behind."""
