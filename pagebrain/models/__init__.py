"""Models as lists of layers, over a neutral :class:`~pagebrain.model_config.ModelConfig`.

A model's ``forward_tokens`` computes the logits of a flat batch of new tokens; K and V are in a paged cache.
:mod:`pagebrain.models.registry` lists the models, and :mod:`pagebrain.models.gpt2` is one.
"""
