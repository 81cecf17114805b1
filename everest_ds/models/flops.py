"""Arithmetic of a model, counted on the model itself: fake tensors, real modules, no arithmetic done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from everest_ds.config.schema import ModelConfig
from everest_ds.models.patches import CHANNELS

AnyModel = TypeVar("AnyModel", bound=ModelConfig)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_flash_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # torch counts the fused kernels of GPUs; the CPU's is missing from its table (2.14).
    return sdpa_flop_count(query, key, value)


def forward_macs(build: Callable[[AnyModel], nn.Module], config: AnyModel) -> int:
    """Multiply-accumulates of one clip's forward pass.

    Matrix products, convolutions and attention products, as papers count them (FLOPs / 2); norms, softmax and
    additions are left out.
    """
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        shape = (1, CHANNELS, config.candidate_frames, config.image_size, config.image_size)
        build(config)(torch.zeros(shape, dtype=torch.uint8))
    return counter.get_total_flops() // 2
