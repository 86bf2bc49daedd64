"""``pagebrain bench serve``: any OpenAI-compatible server under load, PageBrain's or another.

:mod:`~pagebrain.bench.serve.serve_bench` is the command, :mod:`~pagebrain.bench.serve.load` its options and loads,
:mod:`~pagebrain.bench.serve.target` the server under test. :mod:`~pagebrain.bench.serve.processes` runs the clients of
:mod:`~pagebrain.bench.serve.http_client`, which send requests and record the arrival time of each chunk.
:mod:`~pagebrain.bench.serve.measurements` reads the answers after the run and defines TTFT, TPOT, ITL and E2E.
"""
