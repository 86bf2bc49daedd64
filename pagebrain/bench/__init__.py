"""Benchmarks: PageBrain beside Hugging Face ``generate`` and continuous batching, kernels, and servers under load.

Every engine runs in a process of its own, which reads its task and writes its measurements.

- :mod:`~pagebrain.bench.workload` makes the requests. :mod:`~pagebrain.bench.child` starts the process and talks to it.
- :mod:`~pagebrain.bench.runners` and :mod:`~pagebrain.bench.hf_runners` run in that process: one engine, one run.
- :mod:`~pagebrain.bench.offline` is the command ``bench offline``, :mod:`~pagebrain.bench.offline_report` its figures.
- :mod:`~pagebrain.bench.engine_loop`, :mod:`~pagebrain.bench.decode_steps` and :mod:`~pagebrain.bench.gpu_times` measure the
  parts of a decode step and compare its memory traffic with a copy.
- :mod:`~pagebrain.bench.kernel_bench` is the command ``bench kernels``.
- :mod:`~pagebrain.bench.serve` is the command ``bench serve``: such requests, sent to a server.
- :mod:`~pagebrain.bench.command` holds what the commands share, :mod:`~pagebrain.bench.machine_facts` describes the machine.
"""
