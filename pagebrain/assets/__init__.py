"""Data of the package: the bundled model, which is used if no model is named."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "storyteller"
"""Folder of a small trained GPT-2 and its tokenizer; its README.md is the model card."""
