"""Settings for all tests."""

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch

IS_CHECK = "PAGEBRAIN_CHECK" in os.environ
"""Whether the course tool runs one chapter's tests: what these do not need is not imported, as a learner waits for them."""

if not IS_CHECK:
    from hypothesis import settings

    # In CI the examples are the same at every run: a red build must be about the change. Elsewhere hypothesis explores.
    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.register_profile("local", deadline=None)
    settings.load_profile("ci" if os.environ.get("CI") else "local")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Servers under test speak plain HTTP. httpx reads all certificates for every client, which takes 30 ms: here are none.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent / "support")

# Triton looks at this when it is first imported, and nothing has imported it yet: without a GPU the same tests run the same
# kernels in its interpreter. With one the kernels are compiled, in all of this process; see tests/support/kernels.py.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if not IS_CHECK and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    with contextlib.suppress(ImportError):  # of a Triton that cannot be imported: tests say so where they need it
        import chapters.aids.triton_anywhere  # noqa: F401  (it makes the interpreter twice as fast)
