"""``pagebrain bench serve``: any OpenAI-compatible server under load, PageBrain's or another.

:mod:`~pagebrain.bench.serve.serve_bench` is the command, :mod:`~pagebrain.bench.serve.load` its options and loads,
:mod:`~pagebrain.bench.serve.target` the server under test. :mod:`~pagebrain.bench.serve.processes` runs the clients of
:mod:`~pagebrain.bench.serve.http_client`, which send and stamp what comes back.
:mod:`~pagebrain.bench.serve.measurements` reads it after the run and defines TTFT, TPOT, ITL and E2E.
"""
