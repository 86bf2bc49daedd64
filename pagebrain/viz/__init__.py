"""Pictures of what an engine did, made from its step traces: matplotlib for notebooks, rich for terminals.

:mod:`~pagebrain.viz.state` reads the traces; the other modules only draw. Engine and chapters write the same traces, so the
same functions draw both. The functions for notebooks return a :class:`Picture`, which a cell shows with its alt text.
Names are imported at their first use: pictures for notebooks need matplotlib, those for terminals do not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pagebrain.viz.terminal as terminal
    from pagebrain.viz.attention import PageStep as PageStep
    from pagebrain.viz.attention import attention_by_page as attention_by_page
    from pagebrain.viz.charts import fragmentation_bars as fragmentation_bars
    from pagebrain.viz.charts import latency_by_context as latency_by_context
    from pagebrain.viz.charts import latency_throughput as latency_throughput
    from pagebrain.viz.charts import staircase as staircase
    from pagebrain.viz.clients import Visit as Visit
    from pagebrain.viz.clients import lanes as lanes
    from pagebrain.viz.compare import compare_traces as compare_traces
    from pagebrain.viz.kernel_charts import context_parts as context_parts
    from pagebrain.viz.kernel_charts import roofline as roofline
    from pagebrain.viz.picture import Picture as Picture
    from pagebrain.viz.picture import alt_to_cells as alt_to_cells
    from pagebrain.viz.picture import show as show
    from pagebrain.viz.pool import block_tables as block_tables
    from pagebrain.viz.pool import pool_map as pool_map
    from pagebrain.viz.source import show_source as show_source
    from pagebrain.viz.source import show_task as show_task
    from pagebrain.viz.state import cached_lengths as cached_lengths
    from pagebrain.viz.steps import memory_over_time as memory_over_time
    from pagebrain.viz.steps import timeline as timeline

_HOMES = {
    "PageStep": "attention",
    "Picture": "picture",
    "Visit": "clients",
    "alt_to_cells": "picture",
    "attention_by_page": "attention",
    "block_tables": "pool",
    "cached_lengths": "state",
    "compare_traces": "compare",
    "context_parts": "kernel_charts",
    "fragmentation_bars": "charts",
    "lanes": "clients",
    "latency_by_context": "charts",
    "latency_throughput": "charts",
    "memory_over_time": "steps",
    "pool_map": "pool",
    "roofline": "kernel_charts",
    "show": "picture",
    "show_source": "source",
    "show_task": "source",
    "staircase": "charts",
    "timeline": "steps",
}

__all__ = [*_HOMES, "terminal"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use. Raises ``ImportError`` with advice if matplotlib is missing."""
    import importlib

    if name == "terminal":
        return importlib.import_module("pagebrain.viz.terminal")
    if name not in _HOMES:
        raise AttributeError(f"module 'pagebrain.viz' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"pagebrain.viz.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(f"viz.{name} draws with matplotlib: pip install 'pagebrain[course]'") from None


def __dir__() -> list[str]:
    return sorted(__all__)
