"""The interface of a model that an executor calls."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pagebrain.attention import ForwardBatch
from pagebrain.model_config import ModelConfig


class Model(nn.Module, ABC):
    """A decoder-only model over a paged cache, made of layers. For inference only: no dropout, no gradients.

    A new model has neither weights nor a cache. :func:`~pagebrain.models.weights.load_weights`,
    :func:`~pagebrain.layers.forms.prepare` and :func:`~pagebrain.attention.layer.attach` are called on it in this order.
    """

    config: ModelConfig

    @abstractmethod
    def forward_tokens(self, batch: ForwardBatch) -> Tensor:
        """One forward pass. Returns the logits ``[num_logits, vocab_size]`` of ``batch.logits_rows``.

        The sequences' block tables must already cover the batch. K and V of its tokens are written to the cache. There may
        be more columns than ``vocab_size``: a head may be padded, see :mod:`pagebrain.layers.linear`.
        """
