"""What chapters and notebooks use besides: experiments, recordings, and helpers for Triton and CUDA graphs. No exercises."""
