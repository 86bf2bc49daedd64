"""The layers that models are made of: linear, norm, embedding.

A layer holds weights in the layout of the checkpoint, and has faster forms for some devices.
:func:`~pagebrain.layers.forms.prepare` chooses a form for each layer of a model, once, after its weights were loaded.
"""

from pagebrain.layers.embedding import Embedding
from pagebrain.layers.forms import Layer, prepare
from pagebrain.layers.linear import Linear
from pagebrain.layers.norm import LayerNorm

__all__ = ["Embedding", "Layer", "LayerNorm", "Linear", "prepare"]
