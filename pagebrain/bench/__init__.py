"""Benchmarks: PageBrain beside Hugging Face ``generate`` and Hugging Face continuous batching; and servers under load.

:mod:`~pagebrain.bench.workload` makes the requests, :mod:`~pagebrain.bench.runners` runs one engine over them in a process
of its own, :mod:`~pagebrain.bench.offline` interleaves the engines and :mod:`~pagebrain.bench.report` says what came out.
:mod:`~pagebrain.bench.closer` looks at where the time of a decode step goes and how near it comes to the memory's roof, and
:mod:`~pagebrain.bench.session` runs several workloads on one engine.
:mod:`~pagebrain.bench.serve` sends such requests to a server.
"""
