"""A DeepSpeed JSON and a recipe become the dictionary that DeepSpeed gets: "auto" filled, contradictions refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.batches import AUTO, Batches
from everest_ds.config.ds_keys import check_keys, todays_keys
from everest_ds.config.ds_refused import check_refused
from everest_ds.config.ds_values import check_plain_values
from everest_ds.config.ds_zero import OFFLOADS, PARTITIONED, check_zero
from everest_ds.config.errors import UserError, shown
from everest_ds.config.files import LARGEST_SETTINGS_BYTES, read_bounded
from everest_ds.config.json_text import parse_json
from everest_ds.config.schema import OptimConfig, Recipe

log = logging.getLogger(__name__)

# The checkout's files; an installed package has none.
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"

# Eight buckets: all but an eighth of the gradients can travel while the backward pass still computes. DeepSpeed's
# default, 5e8 elements, is larger than most of our models: a gigabyte per rank that is never filled.
_BUCKETS = 8
_LARGEST_BUCKET = 100_000_000  # elements; beyond this a larger message is no faster
_BUCKET_ALIGNMENT = 1024  # elements; DeepSpeed wants its all-gather bucket even
# Parameters smaller than this stay whole under ZeRO-3: norms and biases, ten times the width (Hugging Face's rule).
_PERSISTENT_WIDTHS = 10
# Of gathered parameters ZeRO-3 keeps two buckets: one being computed with, one on its way. DeepSpeed's defaults, 1e9
# elements, keep whatever the forward pass gathers of any of our models for the backward pass.
_LIVE_BUCKETS = 2
# ZeRO-3 updates an eighth of a rank's parameters at a time; from NVMe they pass through several buffers of that size.
# DeepSpeed's default, 1e9 elements, would be all at once: as much host memory as offload without NVMe takes. A smaller
# one than 1 MiB isn't swapped.
_LEAST_SUB_GROUP = 2**18  # fp32 elements
# As in the official scripts, and in the files of ds_configs/.
_AUTO_OFF = {"gradient_clipping": 0.0}


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
    """Read a DeepSpeed JSON to train with. Keys of older versions of DeepSpeed become today's, with a warning.

    Raises:
        UserError: the file is missing, isn't JSON, isn't an object, or has a key that nothing reads.
    """
    where = f"ds_config {path}"
    config, old = todays_keys(read_ds_config(path), where)
    for key, now in old.items():
        log.warning("%s: %s is an old name; it is read as %s", where, key, now)
    check_keys(config, where)
    return config


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON as it is, such as that of a run by an older version of ours.

    Raises:
        UserError: the file is missing, isn't JSON, or isn't an object.
    """
    try:
        config = parse_json(read_bounded(path, LARGEST_SETTINGS_BYTES).decode())
    except OSError as error:
        raise UserError(f"ds_config {path}: {error.strerror}; shipped ones are in ds_configs/") from error
    except ValueError as error:
        raise UserError(f"ds_config {path}: not a JSON file ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"ds_config {path}: expected a JSON object, got {type(config).__name__}")
    return config


def resolve_ds_config(raw: dict[str, Any], recipe: Recipe, facts: Facts) -> tuple[dict[str, Any], Batches]:
    """Return the dictionary for ``deepspeed.initialize`` and the batch numbers.

    Raises:
        UserError: recipe and JSON contradict each other, or ask for what the machine can't do.
    """
    ds, _ = todays_keys(raw)
    check_keys(ds)
    check_refused(ds, on_cpu=facts.on_cpu)
    check_plain_values(ds)
    batches = Batches.resolve(recipe.train, ds, facts.ranks)
    ds |= batches.as_deepspeed()
    _fill(ds, _AUTO_OFF)
    _fill(_section(ds, "data_types"), {"keep_in_fp32_modules": []})
    _fill_precision(ds, facts)
    _fill_optimizer(ds, recipe.optim, batches)
    zero = _section(ds, "zero_optimization")
    _fill(zero, _zero_rules(facts, _stage(zero)))
    for name in OFFLOADS:
        _fill_offload(_section(zero, name, "zero_optimization."), facts)
    check_zero(ds, _stage(zero), ranks=facts.ranks)
    # Where the section is there, DeepSpeed 0.19 logs, whatever it says.
    if not _section(ds, "comms_logger").get("enabled", False):
        ds.pop("comms_logger", None)
    throughput = _section(_section(ds, "timers"), "throughput", "timers.")
    if throughput and throughput.get("enabled", True) and "steps_per_print" not in ds:
        raise UserError("ds_config timers.throughput: its lines come every steps_per_print steps; give that, too")
    unfilled = list(_autos(ds))
    if unfilled:
        raise UserError(f"ds_config {unfilled[0]}: 'auto' can't be filled here; give a value")
    # Rates are ours; for those of DeepSpeed the host waits for the device twice in every pass (utils/timer.py,
    # ThroughputTimer).
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


def products_precision(ds: dict[str, Any]) -> str:
    """The type that matrix products compute in: that of parameters, or torch_autocast's where that is on."""
    autocast = ds.get("torch_autocast") or {}
    if not autocast.get("enabled", False):
        return precision(ds)
    return "bf16" if "bf" in autocast.get("dtype", "fp16") else "fp16"


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
        # Whole weights are what a run leaves in any case.
        "stage3_gather_16bit_weights_on_model_save": False,
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


def _fill_offload(section: dict[str, Any], facts: Facts) -> None:
    """Fill a section of offload; where it is on, DeepSpeed would pin memory on a CPU, too."""
    _fill(section, {"device": "none", "pin_memory": not facts.on_cpu})
    if section.get("device", "none") != "none":
        section.setdefault("pin_memory", not facts.on_cpu)


def _fill_precision(ds: dict[str, Any], facts: Facts) -> None:
    """Resolve bf16 and fp16. "auto" yields to the other one when that is on; if both are "auto", bf16 comes first."""
    supported = {"bf16": facts.bf16_supported, "fp16": facts.fp16_supported}
    sections = {name: _section(ds, name) for name in supported}
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


def _stage(zero: dict[str, Any]) -> int:
    stage = zero.get("stage", 0)
    if stage == AUTO:
        raise UserError("ds_config zero_optimization.stage: 'auto' can't be filled here; give a value")
    if type(stage) is not int or stage not in range(4):
        raise UserError(f"ds_config zero_optimization.stage: expected 0, 1, 2 or 3, got {shown(stage)}")
    return stage


def _autos(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _autos(value, f"{prefix}.{key}" if prefix else key)
    elif tree == AUTO:
        yield prefix
