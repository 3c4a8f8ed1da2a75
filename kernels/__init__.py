"""Device code that torch has no direct operation for; every kernel is a module of its own.

Importing this package imports neither torch nor triton: import the module of the kernel instead. In each of
them the public function runs a Triton kernel on CUDA and ROCm tensors and its torch reference on CPU tensors.
"""

__all__: list[str] = []
