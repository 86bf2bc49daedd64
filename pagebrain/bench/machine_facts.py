"""The machine and the versions that a benchmark was measured with."""

import platform

from pagebrain import __version__
from pagebrain.kernels.version import installed
from pagebrain.machine import memory_limit_bytes


def versions(device: str) -> dict[str, str]:
    """Versions of the libraries, and the machine; ``device`` is torch's name."""
    import torch
    import transformers

    found = {
        "pagebrain": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "memory": f"{memory_limit_bytes() / 1e9:.1f} GB",
    }
    if not device.startswith("cuda"):
        return found
    return found | {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), "triton": installed()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            return next(line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
