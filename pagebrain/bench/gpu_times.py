"""What a GPU did during a few steps: the time of its kernels by category, and of the host's calls that launched them.

``torch.profiler`` records every kernel, those inside a CUDA graph too, and every call of the CUDA runtime. Its trace is read
as the JSON that it exports. Recording slows the host down, so no timed run is recorded.
"""

import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pagebrain
from pagebrain.bench.child import synchronize

PRODUCTS, HEAD, SAMPLING = "matrix products", "head", "sampling"

CATEGORIES = {
    "attention": r"attention|attn|attend|paged|flash|fmha",
    PRODUCTS: r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|matmul|linear",
    SAMPLING: r"sampl|arg_?max|top_?[kp]|multinomial|softmax|sort|gumbel|philox|random|scan|cumsum|reduce_kernel",
    "norms and embedding": r"norm|embed|locate|gather|index",
    "copies": r"memcpy|memset|copy|catarray|fill",
}
"""Category -> pattern of the names of libraries' kernels; the first match counts, and the rest is ``other``."""

OTHER = "other"
ALL_CATEGORIES = ("attention", PRODUCTS, "norms and embedding", HEAD, SAMPLING, "copies", OTHER)
"""In the order in which they are shown."""

_LAUNCHES = re.compile(r"launch|memcpyasync|memsetasync", re.IGNORECASE)
"""Calls of the runtime that launch work on the GPU; calls that wait for it do not count."""


@dataclass
class GpuTimes:
    """Seconds over all recorded steps.

    Attributes:
        by_category: kernel time of each category. Time in which two kernels ran counts for both.
        busy_s: time in which at least one kernel ran.
        launch_s: time of the host's calls that launch kernels, graphs and copies.
        num_kernels: number of kernels.
        num_launches: number of calls that launched them.
        longest: the kernels with the longest total time, name -> seconds.
    """

    by_category: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALL_CATEGORIES, 0.0))
    busy_s: float = 0.0
    launch_s: float = 0.0
    num_kernels: int = 0
    num_launches: int = 0
    longest: dict[str, float] = field(default_factory=dict)


@functools.cache
def own_kernels() -> dict[str, str]:
    """Name -> category of the engine's own kernels, for the modules whose kernels are all of one category."""
    found: dict[str, str] = {}
    attention = ("decode", "grouped_decode", "prefill", "write")
    sampling = ("sample", "sample_kernels", "sample_limits", "sample_row")
    for modules, category in ((attention, "attention"), (sampling, SAMPLING)):
        for module in modules:
            path = Path(pagebrain.__file__).parent / "kernels" / f"{module}.py"
            names = re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            found |= dict.fromkeys(names, category)
    return found


def category_of(kernel: str) -> str:
    """The category of a kernel: by its module if it is the engine's own, otherwise by its name."""
    if kernel in own_kernels():
        return own_kernels()[kernel]
    name = kernel.lower()
    return next((category for category, pattern in CATEGORIES.items() if re.search(pattern, name)), OTHER)


def read_trace(events: Iterable[Mapping[str, Any]]) -> GpuTimes:
    """Add up the events of a Chrome trace, whose times are microseconds."""
    times = GpuTimes()
    on_gpu: list[tuple[float, float, str]] = []
    for event in events:
        group, name = str(event.get("cat", "")).lower(), str(event.get("name", ""))
        if group in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_gpu.append((float(event["ts"]), float(event["dur"]), name))
        elif group in ("cuda_runtime", "cuda_driver") and _LAUNCHES.search(name):
            times.launch_s += float(event.get("dur", 0.0)) / 1e6
            times.num_launches += 1
    on_gpu.sort()
    categories = _with_head([category_of(name) for _, _, name in on_gpu])
    by_name: dict[str, float] = {}
    busy_until = 0.0
    for (start, duration, name), category in zip(on_gpu, categories):
        times.by_category[category] += duration / 1e6
        by_name[name] = by_name.get(name, 0.0) + duration / 1e6
        times.busy_s += max(0.0, start + duration - max(start, busy_until)) / 1e6
        busy_until = max(busy_until, start + duration)
    times.num_kernels = len(on_gpu)
    times.longest = dict(sorted(by_name.items(), key=lambda item: -item[1])[:12])
    return times


def _with_head(categories: Sequence[str]) -> list[str]:
    """Relabel the last matrix product before sampling: it is the head's, although its kernel is named like the others."""
    found = list(categories)
    product: list[int] = []  # the kernels of the latest product: a split product adds its parts up in a second kernel
    for index, category in enumerate(categories):
        if category == PRODUCTS:
            product = [*product, index] if product and product[-1] == index - 1 else [index]
        elif category == SAMPLING:
            for part in product:
                found[part] = HEAD
            product = []
    return found


class Recorder:
    """Records the steps ``first`` to ``last``, both included, of a loop that calls :meth:`before_step`."""

    def __init__(self, device: str, first: int, last: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.device, self.first, self.last = device, first, last
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._is_on = False
        self._error: Exception | None = None

    def before_step(self, number: int) -> None:
        """Begin or end the recording. :meth:`times` raises an error that occurs here."""
        if number == self.first:
            synchronize(self.device)  # a step in flight is not recorded
            self._attempt(self._profile.start)
            self._is_on = True
        elif number > self.last:
            self.stop()

    def stop(self) -> None:
        """End the recording if it is on."""
        if self._is_on:
            self._is_on = False
            synchronize(self.device)
            self._attempt(self._profile.stop)

    def _attempt(self, change: Callable[[], None]) -> None:
        try:
            if self._error is None:
                change()
        except Exception as error:  # recording may not be permitted, and the run must continue without it
            self._error = error

    def times(self) -> GpuTimes:
        """The recorded times. Raises what the profiler raised."""
        self.stop()
        if self._error is not None:
            raise self._error
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            return read_trace(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])
