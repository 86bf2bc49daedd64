"""Which notebooks `make test` executes: chapter 06 only where there is a Triton to run its kernels."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["06_kernels.ipynb"]
