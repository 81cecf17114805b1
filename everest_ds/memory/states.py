"""What a rank holds between steps: parameters, master copies, moments, gradients and buffers, per ZeRO stage.

Every item carries its formula and where DeepSpeed (0.19.8) allocates it, so that a number can be argued with. n counts
the model's parameters, p this rank's partition with padding, b the bytes of an element in training precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from everest_ds.config.schema import ModelConfig
from everest_ds.data.to_device import BUFFERS
from everest_ds.memory.setting import FP32_BYTES, FlatGroup, ZeroSetting, groups_of, share, sub_groups
from everest_ds.memory.trace import Parameter
from everest_ds.models.patches import CHANNELS

_STAGE12 = "runtime/zero/stage_1_and_2.py"
_STAGE3 = "runtime/zero/stage3.py"
# Names of items, by which what a run holds is measured too (training/held.py).
PARAMETERS = "parameters"
MASTERS = "fp32 master parameters"
MOMENTS = "Adam moments"
KEPT_WHOLE = "parameters kept whole"
GRADIENTS = "gradients"
FP32_GRADIENTS = "fp32 gradients"
ACCUMULATED = "accumulated gradients"
PARAMETER_STAGING = "parameter staging buffer"
GRADIENT_STAGING = "gradient staging buffer"
REDUCE_BUCKET = "reduce bucket"
SWAP_BUFFERS = "swap buffers"
TABLES = "position tables"
AVERAGE = "averaged weights"
CLIPS = "clips (this pass's and the next's)"
Place = Literal["device", "host", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """Bytes held between steps, and where; ``pinned``: page-locked where DeepSpeed is asked to.

    ``per_clip_bytes``: more for each clip of the micro-batch.
    """

    name: str
    size_bytes: int
    formula: str
    source: str
    place: Place = "device"
    pinned: bool = False
    per_clip_bytes: int = 0


def states(parameters: Sequence[Parameter], setting: ZeroSetting, buffer_bytes: int = 0) -> list[Item]:
    """Itemise what one rank holds between steps, once the first step has made the optimizer's states.

    Args:
        parameters: of the model, in its order.
        setting: the DeepSpeed settings.
        buffer_bytes: of the model's buffers (position tables), which no stage partitions.
    """
    rows = {0: _stage0, 1: _stage12, 2: _stage12, 3: _stage3}[setting.stage](parameters, setting)
    buffers = Item(name=TABLES, size_bytes=buffer_bytes, formula="fp32 buffers", source="everest_ds.models")
    return [item for item in (*rows, buffers) if item.size_bytes]


def _stage0(parameters: Sequence[Parameter], setting: ZeroSetting) -> Iterator[Item]:
    n, b = sum(p.elements for p in parameters), setting.element_bytes
    yield Item(name=PARAMETERS, size_bytes=n * b, formula="n x b", source="runtime/engine.py")
    if setting.precision != "fp32":
        where = "runtime/fp16/fused_optimizer.py, FP16_Optimizer.__init__ (fp32_groups_flat)"
        yield Item(name=MASTERS, size_bytes=n * FP32_BYTES, formula="n x 4", source=where)
    yield Item(
        name=MOMENTS,
        size_bytes=2 * n * FP32_BYTES,
        formula="n x 8",
        source="ops/adam/fused_adam.py, FusedAdam.step (exp_avg, exp_avg_sq)",
    )


def _stage12(parameters: Sequence[Parameter], setting: ZeroSetting) -> Iterator[Item]:
    groups = [FlatGroup(group, setting.ranks) for group in groups_of(parameters)]
    padded, partition = sum(g.padded for g in groups), sum(g.partition for g in groups)
    b, host = setting.element_bytes, setting.offload_optimizer
    place: Place = "host" if host else "device"
    yield Item(
        name=PARAMETERS,
        size_bytes=padded * b,
        formula="n x b, each group padded to 2 x ranks elements",
        source=f"{_STAGE12}, __init__ (bit16_groups_flat)",
    )
    yield Item(
        name=MASTERS,
        size_bytes=partition * FP32_BYTES,
        formula="p x 4 (a copy even when training in fp32)",
        source=f"{_STAGE12}, __init__ (single_partition_of_fp32_groups)",
        place=place,
        pinned=host,
    )
    yield Item(
        name=MOMENTS,
        size_bytes=2 * partition * FP32_BYTES,
        formula="p x 8",
        source="ops/adam/cpu_adam.py" if host else "ops/adam/fused_adam.py",
        place=place,
    )
    if host:
        yield from _stage12_offload(partition, max(p.elements for p in parameters), b)
    if host and setting.accumulation > 1:
        owned = (p for g in groups for p in g.parameters if any(i.rank == setting.rank for i in g.pieces()[p.name]))
        yield Item(
            name=ACCUMULATED,
            size_bytes=sum(p.elements for p in owned) * b,
            formula="parameters that reach into p x b",
            source=f"{_STAGE12}, async_accumulate_grad_in_cpu_via_gpu (accumulated_grads_in_cpu)",
            place="host",
        )


def _stage12_offload(partition: int, largest: int, b: int) -> Iterator[Item]:
    yield Item(
        name=FP32_GRADIENTS,
        size_bytes=partition * FP32_BYTES,
        formula="p x 4",
        source=f"{_STAGE12}, initialize_optimizer_states (single_partition_of_fp32_groups.grad)",
        place="host",
        pinned=True,
    )
    yield Item(
        name=PARAMETER_STAGING,
        size_bytes=partition * b,
        formula="p x b",
        source=f"{_STAGE12}, __init__ (param_buffer_of_bit16_for_cpu_offload_groups)",
        place="host",
        pinned=True,
    )
    for where in ("cpu", "gpu"):
        yield Item(
            name=GRADIENT_STAGING,
            size_bytes=largest * b,
            formula="largest parameter x b",
            source=f"{_STAGE12}, __init__ (temp_grad_buffer_for_{where}_offload)",
            place="host" if where == "cpu" else "device",
            pinned=where == "cpu",
        )


def _stage3(parameters: Sequence[Parameter], setting: ZeroSetting) -> Iterator[Item]:
    partition = sum(share(p, setting.ranks) for p in parameters)
    b, host = setting.element_bytes, setting.offload_optimizer
    yield Item(
        name=PARAMETERS,
        size_bytes=partition * b,
        formula="p x b, each parameter padded to the ranks",
        source=f"{_STAGE3}, _create_fp16_partitions_with_defragmentation (lp_param_buffer)",
        place="host" if setting.offload_param else "device",
        pinned=setting.offload_param,
    )
    yield Item(
        name=KEPT_WHOLE,
        size_bytes=sum(share(p, setting.ranks) * setting.ranks * b for p in kept_whole(parameters, setting)),
        formula="those of at most stage3_param_persistence_threshold elements x b",
        source="runtime/zero/parameter_offload.py, mark_persistent_parameters",
    )
    yield Item(
        name=GRADIENTS,
        size_bytes=partition * b,
        formula="p x b",
        source=f"{_STAGE3}, _setup_for_real_optimizer (grad_partitions_flat_buffer)",
        place="host" if host else "device",
        pinned=host,
    )
    yield from _stage3_optimizer(parameters, setting)
    if setting.contiguous_gradients:
        yield Item(
            name=REDUCE_BUCKET,
            size_bytes=setting.reduce_bucket * b,
            formula="reduce_bucket_size x b",
            source=f"{_STAGE3}, _setup_for_real_optimizer (IPGBucketZ3.buffer)",
        )


def _stage3_optimizer(parameters: Sequence[Parameter], setting: ZeroSetting) -> Iterator[Item]:
    """Masters and moments of each sub-group, in memory or, where it is large enough, on NVMe."""
    groups = [[share(p, setting.ranks) for p in group] for group in sub_groups(parameters, setting)]
    kept = sum(sum(group) for group in groups if not setting.swaps(sum(group)))
    host = setting.offload_optimizer
    if kept:
        yield from _masters_and_moments(kept, "p", "host" if host else "device")
    if kept and host:
        yield Item(
            name=FP32_GRADIENTS,
            size_bytes=kept * FP32_BYTES,
            formula="p x 4",
            source=f"{_STAGE3}, initialize_optimizer_states (fp32_partitioned_groups_flat.grad)",
            place="host",
            pinned=True,
        )
    if setting.swap_buffers:
        yield from _swapped(groups, setting)


def _masters_and_moments(elements: int, formula: str, place: Place) -> Iterator[Item]:
    yield Item(
        name=MASTERS,
        size_bytes=elements * FP32_BYTES,
        formula=f"{formula} x 4",
        source=f"{_STAGE3}, _create_fp32_partitions",
        place=place,
    )
    yield Item(
        name=MOMENTS,
        size_bytes=2 * elements * FP32_BYTES,
        formula=f"{formula} x 8",
        source="ops/adam/fused_adam.py" if place == "device" else "ops/adam/cpu_adam.py",
        place=place,
    )


def _swapped(groups: list[list[int]], setting: ZeroSetting) -> Iterator[Item]:
    """What is in files, one per tensor of a sub-group and per gradient, and the buffers that they pass through."""
    on_nvme = [group for group in groups if setting.swaps(sum(group))]
    if on_nvme:
        elements = sum(setting.in_swap_units(sum(group)) for group in on_nvme)
        yield from _masters_and_moments(elements, "p of the sub-groups of 1 MiB or more, in whole KiB,", "nvme")
        yield Item(
            name=FP32_GRADIENTS,
            size_bytes=sum(setting.swapped_gradient(piece) for group in on_nvme for piece in group) * FP32_BYTES,
            formula="parts of 1 MiB or more, in whole KiB, x 4",
            source="runtime/swap_tensor/optimizer_utils.py, _swap_out_gradients",
            place="nvme",
        )
    yield Item(
        name=SWAP_BUFFERS,
        size_bytes=setting.swap_buffers * setting.in_swap_units(max(sum(group) for group in groups)) * FP32_BYTES,
        formula="buffer_count x the largest sub-group, in whole KiB, x 4",
        source="runtime/swap_tensor/utils.py, SwapBufferManager.__init__",
        place="host",
    )


def averaged_weights(parameters: Sequence[Parameter]) -> Item:
    """The moving average of the weights that fine-tuning may keep (``train.ema_decay``), whole on every rank."""
    return Item(
        name=AVERAGE,
        size_bytes=sum(p.elements for p in parameters) * FP32_BYTES,
        formula="n x 4",
        source="everest_ds.training.average",
    )


def clips_ahead(model: ModelConfig) -> Item:
    """The clips of a pass and, copied while it runs, those of the next one: on an accelerator alone."""
    return Item(
        name=CLIPS,
        size_bytes=0,
        per_clip_bytes=BUFFERS * CHANNELS * model.candidate_frames * model.image_size**2,
        formula="2 x 3 x frames x side x side, a clip",
        source="everest_ds.data.to_device",
    )


def kept_whole(parameters: Sequence[Parameter], setting: ZeroSetting) -> list[Parameter]:
    """The parameters that ZeRO-3 keeps gathered; with one rank a gathered parameter is its partition, so none."""
    if setting.ranks == 1:
        return []
    return [p for p in parameters if p.elements <= setting.persistence_threshold]


def largest_sub_group(parameters: Sequence[Parameter], setting: ZeroSetting) -> int:
    """Elements of the largest ZeRO-3 optimizer sub-group on one rank."""
    return max(sum(share(p, setting.ranks) for p in group) for group in sub_groups(parameters, setting))
