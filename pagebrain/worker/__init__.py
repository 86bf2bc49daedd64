"""The device's side of a step.

An executor applies the plan of a step, runs the model and the sampler, and returns tokens. :mod:`.torch_executor` runs on
every device, :mod:`.cuda_executor` with CUDA graphs over :mod:`.batch_rows`.
"""
