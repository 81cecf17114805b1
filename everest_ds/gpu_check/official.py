"""A step as the official code takes it: fp32 parameters, fp16 autocast, materialised attention, AdamW, no DeepSpeed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from everest_ds.config.schema import Recipe
from everest_ds.gpu_check.cases import Values
from everest_ds.memory import meters
from everest_ds.memory.objectives import random_batch
from everest_ds.models import build_network
from everest_ds.models.parameter_groups import parameter_groups
from everest_ds.training import ranks
from everest_ds.training.measure import timed

_WARM_UP_STEPS = 2


def measure(recipe: Recipe, *, snapshot: Path | None = None) -> Values:
    """Measure the memory of a pre-training step on this device. Bytes and seconds."""
    device = ranks.device()
    meters.forget_workspaces(device)
    leftover = meters.states_bytes(device)
    model = build_network(recipe.model, device_type=device.type).to(device)
    # The official optimizer is of a time before fused and foreach ones: a parameter after another.
    groups = parameter_groups(model, recipe.optim.weight_decay, recipe.optim.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False)
    scaler = torch.amp.GradScaler(device.type)
    batch = random_batch(model, recipe.train.micro_batch)  # type: ignore[arg-type]

    def step() -> None:
        with torch.autocast(device.type, torch.float16):
            loss = model(batch.clips.to(device), batch.noise.to(device)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for _ in range(_WARM_UP_STEPS):
        step()
    step_s = timed(step)
    with meters.allocator_snapshot(device, snapshot, stacks=False):
        peak, device_memory = meters.peak_of(step, device)
    meters.forget_workspaces(device)
    held = meters.states_bytes(device) - leftover - (batch.clips.nbytes + batch.noise.nbytes) * (device.type == "cpu")
    return {
        "allocated_bytes": peak - leftover,
        "held_bytes": held,
        "step_s": step_s,
        "optimizer": "torch AdamW",
        **({} if device_memory is None else dataclasses.asdict(device_memory)),
    }
