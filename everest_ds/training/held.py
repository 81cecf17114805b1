"""The tensors that a rank holds between steps, by the names that memory/states.py plans them under."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from everest_ds.data.to_device import DeviceBatches
from everest_ds.memory import states
from everest_ds.training.average import Average
from everest_ds.training.whole import masters

# Where DeepSpeed's optimizers (0.19) keep the rest, for each stage that has it: attribute and item.
_BUFFERS = {
    "fp16_groups_flat": states.PARAMETERS,
    "bit16_groups_flat": states.PARAMETERS,
    "lp_param_buffer": states.PARAMETERS,
    "grad_partitions_flat_buffer": states.GRADIENTS,
    "accumulated_grads_in_cpu": states.ACCUMULATED,
    "param_buffer_of_bit16_for_cpu_offload_groups": states.PARAMETER_STAGING,
    "temp_grad_buffer_for_cpu_offload": states.GRADIENT_STAGING,
    "temp_grad_buffer_for_gpu_offload": states.GRADIENT_STAGING,
}


def held_items(engine: Any, average: Average | None, loader: DeviceBatches) -> dict[str, dict[str, int]]:
    """Return bytes by device type and item; a storage that several items share is the first one's.

    Args:
        engine: DeepSpeed's, with an optimizer.
        average: averaged weights, if there are any.
        loader: of the run.
    """
    found: dict[str, dict[str, int]] = {}
    seen: set[int] = set()
    for name, tensor in _tensors(engine, average, loader):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage.nbytes():
            seen.add(storage._cdata)
            items = found.setdefault(storage.device.type, {})
            items[name] = items.get(name, 0) + storage.nbytes()
    return found


def _tensors(engine: Any, average: Average | None, loader: DeviceBatches) -> Iterator[tuple[str, Tensor]]:
    optimizer, module = engine.optimizer, engine.module
    for attribute, name in _BUFFERS.items():
        yield from _named(name, getattr(optimizer, attribute, None))
    for parameter in module.parameters():
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: its part, and all of it where that is gathered
            yield states.PARAMETERS, parameter.ds_tensor
            yield states.KEPT_WHOLE, parameter
        else:
            yield states.PARAMETERS, parameter
        yield from _named(states.GRADIENTS, parameter.grad)
    yield from _named(states.TABLES, list(module.buffers()))
    for master in masters(engine):
        yield states.MASTERS, master
        yield from _named(states.FP32_GRADIENTS, master.grad)
    inner = getattr(optimizer, "optimizer", optimizer)
    yield from _named(states.MOMENTS, [list(of_one.values()) for of_one in inner.state.values()])
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield from _named(states.REDUCE_BUCKET, bucket.buffer)
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is not None:
        yield from _named(states.SWAP_BUFFERS, swapper.swap_buffer_manager.all_buffers)
    yield from _named(states.AVERAGE, None if average is None else average.state)
    yield from _named(states.CLIPS, loader.buffers)


def _named(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    for value in tree_iter(tree):
        if torch.is_tensor(value):
            yield name, value
