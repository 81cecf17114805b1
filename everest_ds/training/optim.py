"""AdamW: which implementation runs it here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn
from torch.optim import Optimizer

from everest_ds.config.ds_config import offloads_optimizer
from everest_ds.config.ds_keys import ADAM_TYPES
from everest_ds.config.errors import UserError
from everest_ds.config.schema import OptimConfig
from everest_ds.models.parameter_groups import parameter_groups
from everest_ds.training.obstacle import Obstacle
from everest_ds.training.ops import op_obstacle


@dataclass(frozen=True, kw_only=True)
class Adam:
    """A row of the table: how to make it, and what it needs: an op of DeepSpeed's (its builder), or something else."""

    name: str
    build: Callable[..., Optimizer]
    op: str = ""
    missing: Callable[[], Obstacle | None] = lambda: None

    def obstacle(self, *, build: bool = True) -> Obstacle | None:
        """Say why it can't be had here; ``build`` as in :func:`everest_ds.training.ops.op_obstacle`."""
        return op_obstacle(self.op, build=build) if self.op else self.missing()


def which_apex() -> str:
    """Which package is importable as apex: "nvidia", "other" (PyPI's is something else) or "none"."""
    if importlib.util.find_spec("apex") is None:
        return "none"
    return "nvidia" if importlib.util.find_spec("amp_C") is not None else "other"


def _missing_apex() -> Obstacle | None:
    return {
        "none": Obstacle("apex is not installed"),
        "other": Obstacle("the apex found is not NVIDIA's (PyPI's is something else)", "pip uninstall apex"),
    }.get(which_apex())


def _build_apex(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    from apex.optimizers import FusedAdam as ApexFusedAdam  # noqa: PLC0415 - optional

    return ApexFusedAdam(groups, adam_w_mode=True, **options)


def _build_torch(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


ADAMS: dict[str, Adam] = {
    "offload": Adam(
        name="DeepSpeedCPUAdam",
        op="CPUAdamBuilder",
        build=lambda groups, **options: DeepSpeedCPUAdam(groups, adamw_mode=True, **options),
    ),
    "deepspeed": Adam(
        name="DeepSpeed FusedAdam",
        op="FusedAdamBuilder",
        build=lambda groups, **options: FusedAdam(groups, adam_w_mode=True, **options),
    ),
    "apex": Adam(name="apex FusedAdam", missing=_missing_apex, build=_build_apex),
    "torch": Adam(name="torch fused AdamW", build=_build_torch),
}


def choose_adam(asked: str, offload: bool, *, build: bool = True) -> tuple[Adam, str]:
    """Return the row to use and why.

    Args:
        asked: ``optim.implementation``: auto, deepspeed, apex or torch.
        offload: the DeepSpeed JSON keeps optimizer states on the host.
        build: build DeepSpeed's op if need be, so that the answer is certain; else say what a run would come to.

    Raises:
        UserError: what was asked for (or what offload needs) can't be had here.
    """
    if offload:
        obstacle = ADAMS["offload"].obstacle(build=build)
        if obstacle:
            raise UserError(f"ds_config zero_optimization.offload_optimizer: needs DeepSpeedCPUAdam, but {obstacle}")
        return ADAMS["offload"], "the optimizer is offloaded to the host"
    if asked != "auto":
        obstacle = ADAMS[asked].obstacle(build=build)
        if obstacle:
            raise UserError(f"optim.implementation={asked}: {obstacle}")
        return ADAMS[asked], f"optim.implementation={asked}"
    reasons: list[str] = []
    for key in ("deepspeed", "apex", "torch"):
        obstacle = ADAMS[key].obstacle(build=build)
        if not obstacle:
            return ADAMS[key], "; ".join(reasons) or "the default"
        reasons.append(str(obstacle))
    raise AssertionError("torch's AdamW is always there")


def build_optimizer(model: nn.Module, optim: OptimConfig, ds: dict[str, Any]) -> tuple[Optimizer | None, str]:
    """Build AdamW over the model's parameter groups, taking its section out of ``ds``.

    Another optimizer type in the JSON is left to DeepSpeed, which then gets the same groups.

    Returns:
        The optimizer (None: DeepSpeed builds its own) and one line saying which was chosen and why.
    """
    section = ds.get("optimizer")
    if section is not None and str(section.get("type", "AdamW")).lower() not in ADAM_TYPES:
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
