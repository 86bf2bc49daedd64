"""Settings for all tests."""

import os

from hypothesis import settings

# In CI the examples are the same at every run: a red build must be about the change. Elsewhere hypothesis keeps exploring.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
