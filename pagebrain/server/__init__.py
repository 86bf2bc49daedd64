"""The engine behind HTTP: an OpenAI-compatible server, its metrics, and a live view of the blocks.

Two processes: one speaks HTTP (``app.py`` and what it includes), the other owns the engine (``worker.py``). Between them
lies :class:`~pagebrain.server.client.EngineClient`. ``run.py`` starts and ends both.
"""
