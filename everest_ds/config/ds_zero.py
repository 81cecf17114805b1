"""What a DeepSpeed JSON asks of ZeRO that its stage, the ranks or the machine can't do: refused before a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError, shown

# What can be offloaded, from which ZeRO stage on.
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}
NVME = "nvme"
PARTITIONED = 3  # the stage that cuts the parameters, too
# Adam's master, two moments and gradient (zero/offload_config.py, buffer_count).
SWAP_BUFFERS = 4


def check_zero(ds: dict[str, Any], stage: int, *, ranks: int) -> None:
    """Refuse what this stage and these ranks can't do.

    Raises:
        UserError: something is asked for that can't be had.
    """
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
