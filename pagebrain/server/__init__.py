"""The engine behind HTTP: an OpenAI-compatible server, its metrics, and a live view of the blocks.

Two processes: one speaks HTTP (``guards/``, ``api/``, ``live/``), the other owns the engine (``link/engine_main.py``).
Between them lies :class:`~pagebrain.server.link.client.EngineClient`. ``run.py`` starts and ends both.
"""
