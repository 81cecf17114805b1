"""A DeepSpeed JSON and a recipe become the dictionary that DeepSpeed gets: "auto" filled, contradictions refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.batches import AUTO, Batches
from everest_ds.config.ds_values import check_plain_values
from everest_ds.config.ds_zero import OFFLOADS, PARTITIONED, check_zero
from everest_ds.config.errors import UserError, nearest, shown
from everest_ds.config.files import LARGEST_SETTINGS_BYTES, read_bounded
from everest_ds.config.json_text import parse_json
from everest_ds.config.schema import OptimConfig, Recipe

# Eight buckets: all but an eighth of the gradients can travel while the backward pass still computes. DeepSpeed's
# default, 5e8 elements, is larger than most of our models: a gigabyte per rank that is never filled.
_BUCKETS = 8
_LARGEST_BUCKET = 100_000_000  # elements; beyond this a larger message is no faster
_BUCKET_ALIGNMENT = 1024  # elements; DeepSpeed wants its all-gather bucket even
# Parameters smaller than this stay whole under ZeRO-3: norms and biases, ten times the width (Hugging Face's rule).
_PERSISTENT_WIDTHS = 10
_CLOSE_KEY = 0.8
# Of gathered parameters ZeRO-3 keeps two buckets: one being computed with, one on its way. DeepSpeed's defaults, 1e9
# elements, keep whatever the forward pass gathers of any of our models for the backward pass.
_LIVE_BUCKETS = 2
# ZeRO-3 updates an eighth of a rank's parameters at a time; from NVMe they pass through several buffers of that size.
# DeepSpeed's default, 1e9 elements, would be all at once: as much host memory as offload without NVMe takes. A smaller
# one than 1 MiB isn't swapped.
_LEAST_SUB_GROUP = 2**18  # fp32 elements

# DeepSpeed ignores a top-level key that it doesn't know, so a typing mistake would train something else unnoticed.
_TOP_LEVEL_KEYS = """
activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger communication_data_type compile
compression_training csv_monitor data_efficiency data_types dump_state elasticity flops_profiler fp16
gradient_accumulation_steps gradient_clipping gradient_predivide_factor load_universal_checkpoint memory_breakdown
monitor_config optimizer prescale_gradients scheduler seed sparse_gradients steps_per_print tensorboard timers
torch_autocast train_batch_size train_micro_batch_size_per_gpu wall_clock_breakdown wandb zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer zero_optimization
""".split()  # noqa: SIM905


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What "auto" depends on besides the recipe: the model, the ranks, the machine.

    ``parameters`` and ``largest`` count elements (of the model, of its largest tensor), ``width`` channels.
    """

    parameters: int
    largest: int
    width: int
    ranks: int
    on_cpu: bool
    bf16_supported: bool
    fp16_supported: bool


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: the file is missing, isn't JSON, isn't an object, or has a mistyped top-level key.
    """
    try:
        config = parse_json(read_bounded(path, LARGEST_SETTINGS_BYTES).decode())
    except OSError as error:
        raise UserError(f"ds_config {path}: {error.strerror}; shipped ones are in ds_configs/") from error
    except ValueError as error:
        raise UserError(f"ds_config {path}: not a JSON file ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"ds_config {path}: expected a JSON object, got {type(config).__name__}")
    for key in config:
        hint = "" if key in _TOP_LEVEL_KEYS else nearest(key, _TOP_LEVEL_KEYS, cutoff=_CLOSE_KEY)
        if hint:
            raise UserError(f"ds_config {path}: unknown key {shown(key)}{hint}")
    return config


def resolve_ds_config(raw: dict[str, Any], recipe: Recipe, facts: Facts) -> tuple[dict[str, Any], Batches]:
    """Return the dictionary for ``deepspeed.initialize`` and the batch numbers.

    Raises:
        UserError: recipe and JSON contradict each other, or ask for what the machine can't do.
    """
    ds = copy.deepcopy(raw)
    check_plain_values(ds)
    batches = Batches.resolve(recipe.train, ds, facts.ranks)
    ds |= batches.as_deepspeed()
    if "scheduler" in ds:
        raise UserError("ds_config scheduler: the schedule is the recipe's (optim.*); remove it from the JSON")
    _fill_precision(ds, facts)
    _fill_optimizer(ds, recipe.optim, batches)
    zero = _section(ds, "zero_optimization")
    _fill(zero, _zero_rules(facts, _stage(zero)))
    for name in OFFLOADS:
        _fill(_section(zero, name, "zero_optimization."), {"pin_memory": not facts.on_cpu})
    check_zero(ds, _stage(zero), ranks=facts.ranks, on_cpu=facts.on_cpu)
    if zero.get("compute_grad_norm") is False:
        raise UserError(
            "ds_config zero_optimization.compute_grad_norm: steps that aren't finite would be taken; remove it"
        )
    unfilled = list(_autos(ds))
    if unfilled:
        raise UserError(f"ds_config {unfilled[0]}: 'auto' can't be filled here; give a value")
    # Progress and metrics are ours; DeepSpeed's own line per ten steps says the same again, and the clock behind it
    # waits for the device twice in every pass (utils/timer.py, ThroughputTimer).
    ds.setdefault("steps_per_print", 2**31)
    ds["timers"] = {"throughput": {"enabled": False}} | _section(ds, "timers")
    return ds, batches


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    zero = ds.get("zero_optimization")
    return _stage(zero) if isinstance(zero, dict) else 0


def offloads_optimizer(ds: dict[str, Any]) -> bool:
    """Whether the optimizer's states live on the host (or NVMe), so that it must be DeepSpeedCPUAdam."""
    section = ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def node_local_storage(ds: dict[str, Any]) -> bool:
    """Whether each node keeps checkpoints on storage of its own."""
    return bool((ds.get("checkpoint") or {}).get("use_node_local_storage", False))


def precision(ds: dict[str, Any]) -> str:
    """The type of parameters and activations: bf16, fp16 or fp32."""
    return next((name for name in ("bf16", "fp16") if ds.get(name, {}).get("enabled", False)), "fp32")


def with_precision(ds_config: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return a DeepSpeed JSON that trains in another precision."""
    others = {key: value for key, value in ds_config.items() if key not in ("bf16", "fp16")}
    return others if precision == "fp32" else others | {precision: {"enabled": True}}


def scaled_lr(lr_per_256: float, global_batch: int) -> float:
    """The linear scaling rule: rates are stated per 256 clips (paper, Table 7)."""
    return lr_per_256 * global_batch / 256


def bucket_elements(facts: Facts) -> int:
    """Elements of a communication bucket that suits the model: an eighth of it, at least its largest tensor."""
    wanted = max(facts.largest, min(math.ceil(facts.parameters / _BUCKETS), _LARGEST_BUCKET))
    return math.ceil(wanted / _BUCKET_ALIGNMENT) * _BUCKET_ALIGNMENT


def _optimizer_rules(optim: OptimConfig, batches: Batches) -> dict[str, Any]:
    return {
        "lr": scaled_lr(optim.base_lr, batches.total),
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }


def _zero_rules(facts: Facts, stage: int) -> dict[str, Any]:
    bucket = bucket_elements(facts)
    return {
        # At stages 1 and 2 the host waits for the device at the end of a backward pass, so that gradients may travel
        # beside it (stage_1_and_2.py, independent_gradient_partition_epilogue): one rank would wait for nothing. Stage
        # 3 doesn't wait, and brings offloaded parameters to the device on the stream that this makes.
        "overlap_comm": facts.ranks > 1 or stage == PARTITIONED,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_reuse_distance": bucket,
        "stage3_max_live_parameters": _LIVE_BUCKETS * bucket,
        "sub_group_size": max(_LEAST_SUB_GROUP, math.ceil(facts.parameters / facts.ranks / _BUCKETS)),
        "stage3_param_persistence_threshold": _PERSISTENT_WIDTHS * facts.width,
    }


def _fill_optimizer(ds: dict[str, Any], optim: OptimConfig, batches: Batches) -> None:
    """Fill the optimizer's numbers; a number that isn't the recipe's would be a second way to say the same."""
    optimizer = _section(ds, "optimizer")
    params = _section(optimizer, "params", "optimizer.")
    rules = _optimizer_rules(optim, batches)
    _fill(params, rules)
    for key, value in rules.items():
        if params.get(key, value) != value:
            raise UserError(
                f"ds_config optimizer.params.{key} = {shown(params[key])} contradicts {value} of the recipe (optim.*); "
                "use 'auto'"
            )


def _section(parent: dict[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    """Return a section of the JSON; an empty one, not attached, where it is absent or null."""
    section = parent.get(name)
    if section is None:
        parent.pop(name, None)
        return {}
    if not isinstance(section, dict):
        raise UserError(f"ds_config {prefix}{name}: expected an object, got {shown(section)}")
    return section


def _fill(section: dict[str, Any], rules: dict[str, Any]) -> None:
    for key, value in rules.items():
        if section.get(key) == AUTO:
            section[key] = value


def _fill_precision(ds: dict[str, Any], facts: Facts) -> None:
    """Resolve bf16 and fp16. "auto" yields to the other one when that is on; if both are "auto", bf16 comes first."""
    if "bfloat16" in ds:
        raise UserError("ds_config bfloat16: DeepSpeed calls it bf16 now; rename the section")
    supported = {"bf16": facts.bf16_supported, "fp16": facts.fp16_supported}
    sections = {name: _section(ds, name) for name in supported}
    for name, section in sections.items():
        enabled = section.get("enabled", False)
        # DeepSpeed takes "yes" and 1 for true, too; what goes by the precision here would not.
        if not isinstance(enabled, bool) and enabled != AUTO:
            raise UserError(f"ds_config {name}.enabled: expected true, false or 'auto', got {shown(enabled)}")
    asked = {name for name, section in sections.items() if section.get("enabled") is True}
    for name, able in supported.items():
        if sections[name].get("enabled") == AUTO:
            sections[name]["enabled"] = able and not facts.on_cpu and not asked - {name}
            asked |= {name} if sections[name]["enabled"] else set()
    if len(asked) > 1:
        raise UserError("ds_config: bf16 and fp16 are both enabled; choose one")
    for name in asked:
        if not supported[name]:
            raise UserError(f"ds_config {name}: this accelerator does not support it; use another precision")
    if sections["bf16"].get("check_grad_overflow") is False:
        raise UserError("ds_config bf16.check_grad_overflow: steps that aren't finite would be taken; remove it")
    if sections["fp16"].get("auto_cast"):
        raise UserError("ds_config fp16.auto_cast: would round the noise that selects tokens; remove it")


def _stage(zero: dict[str, Any]) -> int:
    stage = zero.get("stage", 0)
    if stage == AUTO:
        raise UserError("ds_config zero_optimization.stage: 'auto' can't be filled here; give a value")
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise UserError(f"ds_config zero_optimization.stage: expected 0, 1, 2 or 3, got {shown(stage)}")
    return stage


def _autos(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _autos(value, f"{prefix}.{key}" if prefix else key)
    elif tree == AUTO:
        yield prefix
