"""The one place that calls ``deepspeed.initialize``."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import logging
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from everest_ds.config.batches import GLOBAL, Batches
from everest_ds.config.ds_config import Facts, resolve_ds_config, zero_stage
from everest_ds.config.ds_zero import check_nvme_paths, nvme_paths
from everest_ds.config.errors import UserError
from everest_ds.config.schema import Recipe
from everest_ds.memory.plan import facts_for
from everest_ds.models import MaskedAutoencoder, VideoClassifier, build_network
from everest_ds.models.parameter_groups import parameter_groups
from everest_ds.training import ranks
from everest_ds.training.deepspeed_errors import check_monitor_packages, in_one_line, reason_of
from everest_ds.training.deepspeed_output import show_what_is_asked
from everest_ds.training.ops import missing_compiler, op_obstacle
from everest_ds.training.optim import build_optimizer

log = logging.getLogger(__name__)
_ASYNC_IO = "AsyncIOBuilder"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A DeepSpeed engine, and the line that says which Adam runs."""

    engine: Any
    optimizer: str


def build_model(recipe: Recipe) -> MaskedAutoencoder | VideoClassifier:
    """Build the recipe's network with its seed, so that every rank starts from the same weights.

    Raises:
        UserError: the model can't be built so.
    """
    torch.manual_seed(recipe.train.seed)
    return build_network(recipe.model, device_type=ranks.device().type, checkpoint=deepspeed.checkpointing.checkpoint)


def describe(recipe: Recipe) -> Facts:
    """Collect what "auto" values of a DeepSpeed JSON depend on, of this machine; the model isn't built for it.

    Raises:
        UserError: the model can't be built so.
    """
    planned = facts_for(recipe, ranks.world_size(), ranks.device().type)
    return dataclasses.replace(planned, bf16_supported=supports("bf16"), fp16_supported=supports("fp16"))


def supports(precision: str) -> bool:
    """Say whether the accelerator computes in fp32, bf16 or fp16."""
    accelerator = get_accelerator()
    halves = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    return precision not in halves or bool(halves[precision]())


def check_ds_config(ds: dict[str, Any]) -> None:
    """Let DeepSpeed judge a resolved configuration.

    Raises:
        UserError: DeepSpeed refuses it; the message is DeepSpeed's.
    """
    try:
        # Without the global batch: it is solved already, and DeepSpeed knows of one rank until the group exists.
        deepspeed.DeepSpeedConfig({key: value for key, value in ds.items() if key != GLOBAL})
    except Exception as error:  # DeepSpeed raises pydantic's, its own and plain assertion errors alike
        raise UserError(f"ds_config: DeepSpeed refuses it: {reason_of(error)}") from error


def resolve(raw: dict[str, Any], recipe: Recipe) -> tuple[dict[str, Any], Batches]:
    """Fill a DeepSpeed JSON for this recipe and machine, and let DeepSpeed judge the result.

    Raises:
        UserError: recipe, JSON and machine don't go together.
    """
    _check_compile(recipe, zero_stage(raw))
    ds, batches = resolve_ds_config(raw, recipe, describe(recipe))
    check_ds_config(ds)
    check_nvme_paths(ds)
    return ds, batches


def _check_compile(recipe: Recipe, stage: int) -> None:
    if not recipe.train.compile:
        return
    missing = missing_compiler()
    if missing:
        raise UserError(f"train.compile: {missing}")
    if stage == 3:
        raise UserError("train.compile: under ZeRO-3 every step would be compiled anew, for minutes; use stage 2")


def initialise(model: nn.Module, recipe: Recipe, ds_config: dict[str, Any], *, traces: Path | None = None) -> Built:
    """Turn a model, a recipe and a resolved DeepSpeed configuration into a running engine; a collective call.

    Args:
        model: as :func:`build_model` makes it.
        recipe: of the run.
        ds_config: the resolved one.
        traces: the file that the trace of an error of DeepSpeed's is added to; None: none.

    Raises:
        UserError: the optimizer asked for can't be had here, a monitor's package is missing, or DeepSpeed refuses.
    """
    ds = copy.deepcopy(ds_config)
    check_monitor_packages(ds)
    swap_folders = _own_swap_folders(ds)
    optimizer, line = build_optimizer(model, recipe.optim, ds)
    parameters = None if optimizer else parameter_groups(model, recipe.optim.weight_decay, recipe.optim.layer_decay)
    show_what_is_asked(ds, building=True)
    with in_one_line(traces):
        deepspeed.checkpointing.configure(None, deepspeed_config=ds)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=parameters, config=ds, dist_init_required=False
        )
    show_what_is_asked(ds, building=False)
    for folder in swap_folders:
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    if not engine.zero_optimization():
        _undo_empty_step(engine.optimizer)
    if not hasattr(engine.optimizer, "_global_grad_norm"):
        _skip_bad_gradients(engine)
    if (scaler := dynamic_scaler(engine)) is not None:
        scaler.raise_error_at_min_scale = False  # a trace: too many bad steps end a run
    if recipe.train.compile:
        engine.compile()
    return Built(engine=engine, optimizer=line)


def _own_swap_folders(ds: dict[str, Any]) -> list[str]:
    """Let this rank's NVMe files lie in a folder of their own: DeepSpeed's names are the same for every run.

    Raises:
        UserError: DeepSpeed can't read and write asynchronously here.
    """
    folders = []
    for name, path in nvme_paths(ds):
        # Foreseen first: that says what is missing.
        obstacle = op_obstacle(_ASYNC_IO, build=False) or op_obstacle(_ASYNC_IO, build=True)
        if obstacle:
            raise UserError(f"ds_config {name}: NVMe needs DeepSpeed's async_io, but {obstacle}")
        try:
            folders.append(tempfile.mkdtemp(prefix=f"everest-rank{ranks.rank()}-", dir=path))
        except OSError as error:
            raise UserError(f"ds_config {name}.nvme_path: {path} can't be written to ({error.strerror})") from error
        atexit.register(shutil.rmtree, folders[-1], ignore_errors=True)
        ds["zero_optimization"][name.rpartition(".")[2]]["nvme_path"] = folders[-1]
    return folders


def dynamic_scaler(engine: Any) -> DynamicLossScaler | None:
    """Return what looks for fp16's loss scale, if anything does."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None


def searches_scale(engine: Any) -> bool:
    """Say whether a smaller loss scale may be found."""
    scaler = dynamic_scaler(engine)
    return scaler is not None and scaler.cur_scale > scaler.min_scale


def _skip_bad_gradients(engine: Any) -> None:
    """Let a bare optimizer skip steps whose gradient isn't finite, and keep its norm, as DeepSpeed's own do.

    The host waits for the device to read the norm, as it does in those.
    """
    optimizer, take, limit = engine.optimizer, engine.optimizer.step, engine.gradient_clipping()
    optimizer._global_grad_norm = torch.zeros(())

    def clip() -> None:
        optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit)

    def step() -> None:
        if not limit:
            gradients = (p.grad for p in engine.module.parameters() if p.grad is not None)
            optimizer._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.overflow = not bool(optimizer._global_grad_norm.isfinite())
        if not optimizer.overflow:
            take()

    engine.clip_fp32_gradients, optimizer.step = clip, step


def _undo_empty_step(optimizer: Any) -> None:
    """Set Adam's step count back to 0.

    In half precision at stage 0 DeepSpeed takes a step with zero gradients to allocate the moments. It changes no
    weight, but its count stays, and the bias correction of the true first steps is off: a quarter less at the first.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
