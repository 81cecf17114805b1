"""AdamW: which implementation runs it here."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn
from torch.optim import Optimizer

from everest_ds.config.ds_config import offloads_optimizer
from everest_ds.config.errors import UserError
from everest_ds.config.schema import OptimConfig
from everest_ds.models.parameter_groups import parameter_groups

_ADAM_TYPES = ("adam", "adamw")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """A row of the table: how to make it, and why it can't be had here (an empty string if it can)."""

    name: str
    obstacle: Callable[[], str]
    build: Callable[..., Optimizer]


def missing_compiler() -> str:
    """Say what is missing to build DeepSpeed's C++ ops; an empty string if nothing is."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ('{compiler}' is not on PATH; Debian and Ubuntu: apt-get install g++)"
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "no ninja (pip install ninja)"
    return ""


def which_apex() -> str:
    """Which package is importable as apex: "nvidia", "other" (PyPI's is something else) or "none"."""
    if importlib.util.find_spec("apex") is None:
        return "none"
    return "nvidia" if importlib.util.find_spec("amp_C") is not None else "other"


def _op_obstacle(builder_name: str) -> Callable[[], str]:
    def obstacle() -> str:
        missing = missing_compiler()
        if missing:
            return missing
        try:
            get_accelerator().create_op_builder(builder_name).load(verbose=False)
        except Exception as error:
            return f"DeepSpeed's {builder_name} did not build ({str(error).partition(chr(10))[0]})"
        return ""

    return obstacle


def _apex_obstacle() -> str:
    found = {"none": "apex is not installed", "other": "the apex found is not NVIDIA's (PyPI's is something else)"}
    return found.get(which_apex(), "")


def _build_apex(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    from apex.optimizers import FusedAdam as ApexFusedAdam  # noqa: PLC0415 - optional

    return ApexFusedAdam(groups, adam_w_mode=True, **options)


def _build_torch(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


ADAMS: dict[str, Adam] = {
    "offload": Adam(
        name="DeepSpeedCPUAdam",
        obstacle=_op_obstacle("CPUAdamBuilder"),
        build=lambda groups, **options: DeepSpeedCPUAdam(groups, adamw_mode=True, **options),
    ),
    "deepspeed": Adam(
        name="DeepSpeed FusedAdam",
        obstacle=_op_obstacle("FusedAdamBuilder"),
        build=lambda groups, **options: FusedAdam(groups, adam_w_mode=True, **options),
    ),
    "apex": Adam(name="apex FusedAdam", obstacle=_apex_obstacle, build=_build_apex),
    "torch": Adam(name="torch fused AdamW", obstacle=str, build=_build_torch),
}


def choose_adam(asked: str, offload: bool) -> tuple[Adam, str]:
    """Return the row to use and why.

    Args:
        asked: ``optim.implementation``: auto, deepspeed, apex or torch.
        offload: the DeepSpeed JSON keeps optimizer states on the host.

    Raises:
        UserError: what was asked for (or what offload needs) can't be had here.
    """
    if offload:
        obstacle = ADAMS["offload"].obstacle()
        if obstacle:
            raise UserError(f"ds_config zero_optimization.offload_optimizer: needs DeepSpeedCPUAdam, but {obstacle}")
        return ADAMS["offload"], "the optimizer is offloaded to the host"
    if asked != "auto":
        obstacle = ADAMS[asked].obstacle()
        if obstacle:
            raise UserError(f"optim.implementation={asked}: {obstacle}")
        return ADAMS[asked], f"optim.implementation={asked}"
    reasons: list[str] = []
    for key in ("deepspeed", "apex", "torch"):
        obstacle = ADAMS[key].obstacle()
        if not obstacle:
            return ADAMS[key], "; ".join(reasons) or "the default"
        reasons.append(obstacle)
    raise AssertionError("torch's AdamW is always there")


def build_optimizer(model: nn.Module, optim: OptimConfig, ds: dict[str, Any]) -> tuple[Optimizer | None, str]:
    """Build AdamW over the model's parameter groups, taking its section out of ``ds``.

    Another optimizer type in the JSON is left to DeepSpeed, which then gets the same groups.

    Returns:
        The optimizer (None: DeepSpeed builds its own) and one line saying which was chosen and why.
    """
    section = ds.get("optimizer")
    if section is not None and str(section.get("type", "AdamW")).lower() not in _ADAM_TYPES:
        return None, f"optimizer: {section['type']}, built by DeepSpeed as its JSON asks"
    options: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if section is not None:
        options |= {k: tuple(v) if isinstance(v, list) else v for k, v in section.get("params", {}).items()}
        del ds["optimizer"]
    adam, why = choose_adam(optim.implementation, offloads_optimizer(ds))
    try:
        optimizer = adam.build(parameter_groups(model, options["weight_decay"], optim.layer_decay), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"ds_config optimizer.params: {error}") from error
    return optimizer, f"optimizer: {adam.name} ({why})"
