"""The engine's stages, one module each, in reading order: from recomputing everything to continuous batching."""
