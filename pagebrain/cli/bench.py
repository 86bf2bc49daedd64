"""``pagebrain bench``: the commands of :mod:`pagebrain.bench`."""

import argparse

from pagebrain.bench.kernel_bench import add_kernels_arguments, run_kernels
from pagebrain.bench.offline import add_offline_arguments, run_offline
from pagebrain.bench.serve.load import add_serve_arguments
from pagebrain.cli.arguments import engine_settings_of

_OPTIONS = {
    "kernels": (add_kernels_arguments, "time the attention kernels on a GPU, beside what its memory can do"),
    "offline": (add_offline_arguments, "generate for many prompts at once and report tokens per second"),
    "serve": (add_serve_arguments, "put a load on an OpenAI-compatible server and report latency, throughput and goodput"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each kind of benchmark."""
    kinds = parser.add_subparsers(dest="kind", title="benchmarks", metavar="KIND", required=True)
    for kind, (add_options, summary) in _OPTIONS.items():
        add_options(kinds.add_parser(kind, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))


def run(args: argparse.Namespace) -> int:
    """Run one kind of benchmark and return its exit status."""
    if args.kind != "serve":
        return run_kernels(args) if args.kind == "kernels" else run_offline(args)
    from pagebrain.bench.serve.serve_bench import run_serve
    from pagebrain.bench.serve.target import parse_launch

    args.engine = {}
    if args.launch is not None:
        args.launch = parse_launch(args.launch)
        args.engine = engine_settings_of(args.launch)
    return run_serve(args)
