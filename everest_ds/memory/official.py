"""The official code's setting: torch DDP, fp32 parameters, fp16 CUDA autocast, attention that materialises N x N.

The official EVEREST and VideoMAE pre-training scripts don't use DeepSpeed; the paper's memory tables come from this.
"""

from __future__ import annotations

import dataclasses

from everest_ds.config.batches import Batches
from everest_ds.config.schema import Recipe
from everest_ds.memory.overheads import NONE, Overheads
from everest_ds.memory.plan import Plan
from everest_ds.memory.setting import FP32_BYTES, ZeroSetting
from everest_ds.memory.states import Item
from everest_ds.memory.step import Step
from everest_ds.memory.trace import TraceSpec, trace_step


class _StepDdp(Step):
    """Gradients whole in fp32 until zero_grad; DDP's buckets are there already, so the reduction takes nothing."""

    def backward_done(self) -> None:
        """DDP reduced while the backward pass ran, in its buckets."""


def official_plan(recipe: Recipe, *, ranks: int, overheads: Overheads = NONE, attention: str = "eager") -> Plan:
    """Plan one rank of the official code's training; ``ds_config`` of the result is empty.

    Args:
        recipe: the model and ``train.micro_batch`` or ``train.global_batch``; of fine-tuning or pre-training.
        ranks: of the run.
        overheads: besides tensors; none unless given.
        attention: "eager", as the official code; "fused" to see what SDPA would save.
    """
    model = dataclasses.replace(recipe.model, attention=attention)  # type: ignore[arg-type]
    recipe = dataclasses.replace(recipe, model=model)
    trace = trace_step(TraceSpec.of(recipe, precision="autocast"))
    setting = ZeroSetting(stage=0, precision="fp32", ranks=ranks)
    n = trace.elements
    rows = (
        ("parameters", n * FP32_BYTES, "n x 4", "fp32 parameters under autocast"),
        ("Adam moments", 2 * n * FP32_BYTES, "n x 8", "torch.optim.AdamW"),
        ("DDP buckets", n * FP32_BYTES if ranks > 1 else 0, "n x 4", "torch DDP, gradient_as_bucket_view=False"),
        ("position tables", trace.buffer_bytes, "fp32 buffers", "everest_ds.models"),
    )
    items = [Item(name=name, size_bytes=size, formula=f, source=source) for name, size, f, source in rows if size]
    return Plan(
        recipe=recipe,
        ds_config={},
        batches=Batches.resolve(recipe.train, {}, ranks),
        setting=setting,
        device_type="cuda",
        overheads=overheads,
        trace=trace,
        states=items,
        step=_StepDdp,
    )
