"""The live page: its files and routes, the feed that runs in the engine process, and the hub that serves the viewers."""
