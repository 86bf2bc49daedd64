"""``pagebrain bench serve``: any OpenAI-compatible server under load, ours or another.

:mod:`~pagebrain.bench.serve.run` is the command. :mod:`~pagebrain.bench.serve.client` sends and stamps what comes back,
:mod:`~pagebrain.bench.serve.records` reads it after the run, :mod:`~pagebrain.bench.serve.metrics` says what TTFT, TPOT, ITL
and E2E mean and computes them.
"""
