"""Checks before the API: connections and their limits, HTTP parsing, paths, API keys, sizes of bodies."""
