"""Arithmetic of a model, counted on the model itself: fake tensors, real modules, no arithmetic done."""

from __future__ import annotations

import dataclasses
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
    return _macs(lambda: build(config)(_clip(config)))


def forward_backward_macs(build: Callable[[AnyModel], nn.Module], config: AnyModel) -> int:
    """Multiply-accumulates of one clip's forward and backward pass, counted like :func:`forward_macs`.

    Less than three times the forward pass: pixels get no gradient, nor does the embedding from tokens that are dropped.
    """
    # The backward pass of the CPU's fused attention has no formula; its products are those of the eager one.
    eager = dataclasses.replace(config, attention="eager")

    def step() -> None:
        out = build(eager)(_clip(eager))
        (out.sum() if isinstance(out, torch.Tensor) else out.loss).backward()

    return _macs(step)


def _clip(config: ModelConfig) -> torch.Tensor:
    shape = (1, CHANNELS, config.candidate_frames, config.image_size, config.image_size)
    return torch.zeros(shape, dtype=torch.uint8)


def _macs(work: Callable[[], Any]) -> int:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2
