"""How torch and the libraries below it say that memory was asked for and not there."""

from __future__ import annotations

import torch

# How allocators and libraries say it that don't raise torch.OutOfMemoryError: torch's CPU allocator (c10/core/impl/
# alloc_cpu.cpp), CUDA's driver, cuBLAS.
_SIGNS = ("DefaultCPUAllocator: ", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory was asked for and not there."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
