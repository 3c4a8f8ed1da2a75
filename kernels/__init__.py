"""Device code (torch references, Triton and CUDA kernels). Empty until the profiler needs it."""

__all__: list[str] = []
