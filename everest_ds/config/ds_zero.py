"""What a DeepSpeed JSON asks of ZeRO and of activation checkpointing, and can't have: refused before a rank starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError, shown

# What can be offloaded, from which ZeRO stage on.
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}
NVME = "nvme"
PARTITIONED = 3  # the stage that cuts the parameters, too
# Adam's master, two moments and gradient (zero/offload_config.py, buffer_count).
SWAP_BUFFERS = 4


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """A row: a key, the values that are refused, on CPUs alone or everywhere, and why."""

    key: str
    refused: Callable[[Any], bool]
    why: str
    on_cpu_only: bool = False


def _given(value: Any) -> bool:
    return value is not None


_MICS = "DeepSpeed 0.19 has no MiCS any more; ds_configs/zero3_hpz.json keeps parameter traffic within a node"
_KERNELS = "its kernels need CUDA; remove it"
_ONE_WHOLE_MODEL = (
    "cuts activations over the ranks that share one model, and here every rank has a whole one; remove it"
)
_EMPTIED = "on a CPU DeepSpeed 0.19 empties what it means to keep; remove it: it is on the host anyway"
_REFUSALS = (
    _Refusal(key="zero_optimization.mics_shard_size", refused=_given, why=_MICS),
    _Refusal(key="zero_optimization.mics_hierarchical_params_gather", refused=_given, why=_MICS),
    _Refusal(key="zero_optimization.zero_quantized_weights", refused=bool, why=_KERNELS, on_cpu_only=True),
    _Refusal(key="zero_optimization.zero_quantized_nontrainable_weights", refused=bool, why=_KERNELS, on_cpu_only=True),
    _Refusal(key="zero_optimization.zero_quantized_gradients", refused=bool, why=_KERNELS, on_cpu_only=True),
    _Refusal(key="activation_checkpointing.cpu_checkpointing", refused=bool, why=_EMPTIED, on_cpu_only=True),
    _Refusal(key="activation_checkpointing.partition_activations", refused=bool, why=_ONE_WHOLE_MODEL),
    _Refusal(key="activation_checkpointing.contiguous_memory_optimization", refused=bool, why=_ONE_WHOLE_MODEL),
)


def check_zero(ds: dict[str, Any], stage: int, *, ranks: int, on_cpu: bool) -> None:
    """Refuse what this stage, these ranks or this machine can't do.

    Raises:
        UserError: something is asked for that can't be had.
    """
    for row in _REFUSALS:
        section, key = row.key.split(".")
        value = (ds.get(section) or {}).get(key)
        if row.refused(value) and (on_cpu or not row.on_cpu_only):
            raise UserError(f"ds_config {row.key}: {row.why}")
    zero = ds.get("zero_optimization") or {}
    for name, least in OFFLOADS.items():
        _check_offload(zero, name, stage, least)
    _check_hpz(zero, stage, ranks)


def nvme_paths(ds: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield each section of a resolved JSON that offloads to NVMe, and the folder that it names."""
    zero = ds.get("zero_optimization") or {}
    for name in OFFLOADS:
        section = zero.get(name) or {}
        if section.get("device") == NVME:
            yield f"zero_optimization.{name}", Path(section["nvme_path"])


def check_nvme_paths(ds: dict[str, Any]) -> None:
    """Look whether the folders for offload to NVMe can be used on this machine.

    Raises:
        UserError: one is not there, or can't be written to.
    """
    for name, path in nvme_paths(ds):
        if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a parent can't be entered
            raise UserError(f"ds_config {name}.nvme_path: {path} is not a folder; make it on a local NVMe file system")
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"ds_config {name}.nvme_path: {path} can't be written to")


def _check_offload(zero: dict[str, Any], name: str, stage: int, least: int) -> None:
    section = zero.get(name) or {}
    device = section.get("device", "none")
    if device == "none":
        return
    key = f"zero_optimization.{name}"
    if device == NVME:
        least = PARTITIONED
    if stage < least:
        raise UserError(f"ds_config {key}: {'NVMe ' if device == NVME else ''}needs ZeRO stage {least} or higher")
    if device != NVME:
        return
    if name != "offload_optimizer":
        raise UserError(f"ds_config {key}.device: 'nvme' is for the optimizer alone; here 'cpu' or 'none'")
    path = section.get("nvme_path")
    if not isinstance(path, str) or not path:
        raise UserError(f"ds_config {key}.nvme_path: expected the path of a folder, got {shown(path)}")
    for step in ("pipeline_read", "pipeline_write"):
        if section.get(step):
            raise UserError(f"ds_config {key}.{step}: DeepSpeed then wants groups in their order; set it to false")
    count = section.get("buffer_count", SWAP_BUFFERS)
    if isinstance(count, int) and count < SWAP_BUFFERS:
        raise UserError(f"ds_config {key}.buffer_count: AdamW needs at least {SWAP_BUFFERS} buffers, got {count}")


def _check_hpz(zero: dict[str, Any], stage: int, ranks: int) -> None:
    size = zero.get("zero_hpz_partition_size", 1)
    if type(size) is not int or size < 1:
        raise UserError(
            f"ds_config zero_optimization.zero_hpz_partition_size: expected a whole number from 1 on, got {shown(size)}"
        )
    if size == 1:
        return
    if stage != PARTITIONED:
        raise UserError("ds_config zero_optimization.zero_hpz_partition_size: needs ZeRO stage 3")
    if ranks % size:
        raise UserError(
            f"ds_config zero_optimization.zero_hpz_partition_size: {ranks} ranks are not groups of {size}; give the "
            "number of ranks on a node"
        )
