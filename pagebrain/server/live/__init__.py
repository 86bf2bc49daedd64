"""The live page: its routes and files, the feed of steps that the engine's process makes, and the hub of its viewers."""
