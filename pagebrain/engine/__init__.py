"""The host's side of a step: the plan, the engine loop, and the outputs.

No module here imports device code (:mod:`pagebrain.worker`, :mod:`pagebrain.attention`, :mod:`pagebrain.models`), so the
engine runs and is tested without a model. In reading order: :mod:`.requests`, :mod:`.sequence`, :mod:`.scheduler`,
:mod:`.plan`, :mod:`.engine`, :mod:`.output_processor`, :mod:`.detokenizer`, :mod:`.trace`.
"""
