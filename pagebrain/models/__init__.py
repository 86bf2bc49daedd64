"""Models as lists of layers, over a neutral :class:`~pagebrain.model_config.ModelConfig`.

A model's ``forward_tokens`` computes a flat batch of new tokens to logits; its K and V lie in a paged cache.
:mod:`pagebrain.models.registry` names the models there are, and :mod:`pagebrain.models.gpt2` is one.
"""
