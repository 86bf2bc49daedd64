"""The Triton kernels, and nothing else is Triton: attention, the writing of K and V, norms, sampling, token lookup.

:mod:`.inputs`, :mod:`.decode_plan` and :mod:`.version` need no Triton; the other modules import it.
"""
