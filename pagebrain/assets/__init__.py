"""Data that ships with the package: the bundled model, which is used wherever no model is named."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "storyteller"
"""Folder of a small trained GPT-2 and its tokenizer; its README.md is the model card."""
