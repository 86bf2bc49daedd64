"""An OpenAI-compatible HTTP server for the engine, with metrics and a live view of the blocks.

There are two processes. One serves HTTP (``guards/``, ``api/``, ``live/``), the other holds the engine
(``link/engine_main.py``). :class:`~pagebrain.server.link.client.EngineClient` connects them. ``run.py`` starts both.
"""
