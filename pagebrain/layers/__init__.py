"""The layers that models are made of: linear, norm, embedding.

A layer holds weights in the layout of the checkpoint, and knows the faster forms in which its device can compute it.
:func:`~pagebrain.layers.forms.prepare` chooses a form for each layer of a model, once, when the weights are there.
"""

from pagebrain.layers.embedding import Embedding
from pagebrain.layers.forms import Layer, prepare
from pagebrain.layers.linear import Linear
from pagebrain.layers.norm import LayerNorm

__all__ = ["Embedding", "Layer", "LayerNorm", "Linear", "prepare"]
