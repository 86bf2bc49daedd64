"""``pagebrain bench``: a thin front for :mod:`pagebrain.bench`."""

import argparse

from pagebrain.bench.kernel_bench import add_kernels_arguments, run_kernels
from pagebrain.bench.offline import add_offline_arguments, run_offline
from pagebrain.bench.serve.load import add_serve_arguments

_KERNELS = "time the attention kernels on a GPU, beside what its memory can do"
_OFFLINE = "generate for many prompts at once and report tokens per second"
_SERVE = "put a load on an OpenAI-compatible server and report latency, throughput and goodput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each kind of benchmark."""
    kinds = parser.add_subparsers(dest="kind", title="benchmarks", metavar="KIND", required=True)
    add_kernels_arguments(kinds.add_parser("kernels", help=_KERNELS, description=f"{_KERNELS[0].upper()}{_KERNELS[1:]}."))
    add_offline_arguments(kinds.add_parser("offline", help=_OFFLINE, description=f"{_OFFLINE[0].upper()}{_OFFLINE[1:]}."))
    add_serve_arguments(kinds.add_parser("serve", help=_SERVE, description=f"{_SERVE[0].upper()}{_SERVE[1:]}."))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named."""
    if args.kind == "serve":
        from pagebrain.bench.serve.serve_bench import run_serve

        return run_serve(args)
    return run_kernels(args) if args.kind == "kernels" else run_offline(args)
