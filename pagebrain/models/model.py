"""What an executor knows of a model."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pagebrain.attention import ForwardBatch
from pagebrain.model_config import ModelConfig


class Model(nn.Module, ABC):
    """A decoder-only model over a paged cache, made of layers. It infers only: no dropout, no gradients.

    It is made without weights and without a cache. :func:`~pagebrain.models.weights.load_weights`,
    :func:`~pagebrain.layers.forms.prepare` and :func:`~pagebrain.attention.layer.attach` bring them, in this order.
    """

    config: ModelConfig

    @abstractmethod
    def forward_tokens(self, batch: ForwardBatch) -> Tensor:
        """The one forward pass. Returns the logits ``[num_logits, vocab_size]`` of ``batch.logits_rows``.

        The sequences' block tables must already cover the batch; K and V of its tokens are written on the way. There may be
        columns past those of the vocabulary: a head may be padded, see :mod:`pagebrain.layers.linear`.
        """
