"""CUDA's fp16 autocast, imitated on CPU tensors: what the official EVEREST and VideoMAE code trains with.

CPU autocast runs softmax and layer norm in half precision; CUDA autocast keeps them in fp32
(pytorch/aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE). What is saved for the
backward pass differs accordingly, most of all the attention maps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_FP32 = (F.layer_norm, torch.layer_norm)


class _Fp32Operators(TorchFunctionMode):
    """Sends half-precision arguments of the operators on CUDA's fp32 list through fp32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SOFTMAX:
            return func(*args, **{**(kwargs or {}), "dtype": torch.float32})
        if func in _FP32:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def cuda_like_autocast(dtype: torch.dtype = torch.float16) -> Iterator[None]:
    """Run CPU tensors under autocast with CUDA's choice of fp32 operators.

    ``torch.is_autocast_enabled("cuda")`` says so too: models ask for the device that they were built for.
    """
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", dtype=dtype), _Fp32Operators():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
