"""The server's link to the engine: streams, admission, the engine's process, and the messages to and from it."""
