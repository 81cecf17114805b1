"""Arithmetic of a model, counted on the model itself: fake tensors, real modules, no arithmetic done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from everest_ds.config.schema import ModelConfig
from everest_ds.models.embedding import TubeletEmbedding
from everest_ds.models.patches import CHANNELS

AnyModel = TypeVar("AnyModel", bound=ModelConfig)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_flash_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # torch counts the fused kernels of GPUs; the CPU's is missing from its table (2.14).
    return sdpa_flop_count(query, key, value)


def forward_macs(build: Callable[[AnyModel], nn.Module], config: AnyModel) -> int:
    """Multiply-accumulates of one clip's forward pass, as papers count them.

    Matrix products, convolutions and attention products (FLOPs / 2); norms, softmax and additions are left out. The
    official models embed every token once, so that is counted here, too. Ours do other products in its place, see
    :func:`done_macs`.
    """
    with FakeTensorMode():
        model = build(config)
        every_token = sum(m.budget.candidate_total * m.weight.numel() for _, m in _embeddings(model))
        done, embedding = _macs(model, lambda: model(_clip(config)))
    return done - embedding + every_token


def done_macs(build: Callable[[AnyModel], nn.Module], config: AnyModel) -> int:
    """Multiply-accumulates of one clip's forward pass that the model really does, counted like :func:`forward_macs`.

    It embeds the visible tokens alone, and scores tokens by products with differences between slots.
    """
    with FakeTensorMode():
        model = build(config)
        return _macs(model, lambda: model(_clip(config)))[0]


def forward_backward_macs(build: Callable[[AnyModel], nn.Module], config: AnyModel) -> int:
    """Multiply-accumulates of one clip's forward and backward pass that the model really does.

    Less than three times the forward pass: pixels get no gradient, and scores have no backward pass.
    """
    # The backward pass of the CPU's fused attention has no formula; its products are those of the eager one.
    eager = dataclasses.replace(config, attention="eager")
    with FakeTensorMode():
        model = build(eager)

        def step() -> None:
            out = model(_clip(eager))
            (out.sum() if isinstance(out, torch.Tensor) else out.loss).backward()

        return _macs(model, step)[0]


def _clip(config: ModelConfig) -> torch.Tensor:
    shape = (1, CHANNELS, config.candidate_frames, config.image_size, config.image_size)
    return torch.zeros(shape, dtype=torch.uint8)


def _embeddings(model: nn.Module) -> Iterator[tuple[str, TubeletEmbedding]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, TubeletEmbedding))


def _macs(model: nn.Module, work: Callable[[], Any]) -> tuple[int, int]:
    """Return the multiply-accumulates of some work with a model: all, and those within its embedding."""
    with FlopCounterMode(display=False) as counter:
        work()
    by_module = counter.get_flop_counts()
    inside = sum(sum(by_module[f"{type(model).__name__}.{name}"].values()) for name, _ in _embeddings(model))
    return counter.get_total_flops() // 2, inside // 2
