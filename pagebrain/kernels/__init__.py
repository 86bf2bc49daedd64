"""The Triton kernels: attention, writing of K and V, norms, sampling, token lookup. No other package imports Triton.

:mod:`.inputs`, :mod:`.decode_plan` and :mod:`.version` need no Triton; the other modules import it.
"""
