"""Memory that real kernels take and fake ones don't show."""

from __future__ import annotations

from typing import Any

import torch

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default
_ROWS = 128  # query rows are padded to whole tiles
_CHANNELS = 32
_FP32_BYTES = 4


def cuda_workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the CUDA counterpart of a CPU operator allocates and frees inside itself.

    Softmax's backward pass multiplies the gradient by the output first (aten/src/ATen/native/cuda/SoftMax.cu,
    softmax_backward_cuda_out: tmp); seen in an H200's allocator.

    Flash attention's backward pass sums the query gradient in fp32 and keeps one fp32 number per row
    (pytorch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: dq_accum, softmax_d).
    Read in the source, not measured.
    """
    if func is _SOFTMAX_BACKWARD:
        return int(args[0].nbytes)
    if func is not _FLASH_BACKWARD:
        return 0
    batch, heads, rows, channels = args[1].shape
    rows, channels = -(-rows // _ROWS) * _ROWS, -(-channels // _CHANNELS) * _CHANNELS
    return int(batch * heads * rows * (channels + 1) * _FP32_BYTES)
