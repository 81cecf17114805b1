"""Which keys a DeepSpeed JSON may have: DeepSpeed ignores most that it doesn't know, and would train something else."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from everest_ds.config.batches import AUTO
from everest_ds.config.ds_refused import REFUSED
from everest_ds.config.ds_values import RULES
from everest_ds.config.errors import UserError, nearest, shown

_CLOSE_KEY = 0.75
_MOST_PLACES = 2  # named of the sections that have such a key
ADAM_TYPES = ("adam", "adamw")

# Names that aren't DeepSpeed's, or no more, and what it calls that now.
_OTHER_NAMES = {
    "max_grad_norm": "gradient_clipping",
    "fp32_allreduce": "communication_data_type",
    "thread_count": "aio.intra_op_parallelism",
    "learning_rate": "lr",
    "output_dir": "output_path",
}
# Of zero_optimization: DeepSpeed takes these names, too; the planner knows one of each.
_SAME = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "module_granularity_threshold": "stage3_module_granularity_threshold",
    "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential": "stage3_allgather_sequential",
}
# Of zero_optimization, too: switches that became sections.
_SWITCHES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_PINNED = "cpu_offload_use_pin_memory"


def _sections() -> dict[str, set[str]]:
    """Collect what each section may have in it; "" is the top level."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in (*RULES, *REFUSED):
        section = ""
        for name in key.split("."):
            found[section].add(name)
            section = f"{section}.{name}" if section else name
    return dict(found)


SECTIONS = _sections()


def todays_keys(raw: dict[str, Any], where: str = "ds_config") -> tuple[dict[str, Any], dict[str, str]]:
    """Return a copy of a DeepSpeed JSON whose old names of ZeRO's keys are today's, and old names that were there.

    Raises:
        UserError: an old name and today's are both there, or an old switch is neither true nor false; ``where`` begins
            the message.
    """
    ds, old = copy.deepcopy(raw), {}
    zero = ds.get("zero_optimization")
    if not isinstance(zero, dict):
        return ds, {}
    for name, now in _SAME.items():
        if name in zero:
            _put(zero, now, zero.pop(name), name, where)
            old[f"zero_optimization.{name}"] = now
    pinned, *switches = (_switch(zero, name, where) for name in (_PINNED, *_SWITCHES))
    for on, (name, section) in zip(switches, _SWITCHES.items(), strict=True):
        if on:
            _put(zero, section, {"device": "cpu", "pin_memory": AUTO if pinned is None else pinned}, name, where)
            old[f"zero_optimization.{name}"] = f'{section} with "device": "cpu"'
    return ds, old


def _put(zero: dict[str, Any], name: str, value: Any, old: str, where: str) -> None:
    if name in zero:
        raise UserError(f"{where}: zero_optimization.{old} is an old name of {name}, which is there too; remove it")
    zero[name] = value


def _switch(zero: dict[str, Any], name: str, where: str) -> bool | None:
    value = zero.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: zero_optimization.{name}: expected true or false, got {shown(value)}")
    return value


def check_keys(ds: dict[str, Any], where: str = "ds_config") -> None:
    """Refuse keys that nothing reads, at any level.

    Raises:
        UserError: there is one; ``where`` begins the message.
    """
    for section, name in _unknown(ds, ""):
        raise UserError(f"{where}: {_told(section, name)}")


def _unknown(inside: dict[str, Any], section: str) -> Iterator[tuple[str, str]]:
    for name, value in inside.items():
        key = f"{section}.{name}" if section else name
        if name not in SECTIONS[section]:
            yield section, name
        elif key in SECTIONS and key not in REFUSED and isinstance(value, dict) and _is_ours(key, inside):
            yield from _unknown(value, key)


def _is_ours(key: str, inside: dict[str, Any]) -> bool:
    """Whether we know what a section may have in it: not the numbers of other optimizers than Adam."""
    return key != "optimizer.params" or str(inside.get("type", ADAM_TYPES[0])).lower() in ADAM_TYPES


def _told(section: str, name: str) -> str:
    there = f" in '{section}'" if section else ""
    if name in _OTHER_NAMES:
        return f"{shown(name)}{there}: DeepSpeed calls it '{_OTHER_NAMES[name]}'"
    places = sorted(place for place, names in SECTIONS.items() if name in names)
    if name in _SAME | _SWITCHES:
        places = ["zero_optimization"]
    if places == [""]:
        return f"{shown(name)} belongs to the top level, not into '{section}'"
    if places:
        return f"{shown(name)} belongs into {_listed(places)}" + (f", not into '{section}'" if section else "")
    hint = nearest(name, SECTIONS[section], cutoff=_CLOSE_KEY)
    return f"unknown key {shown(name)}{there}{hint or ', which nothing reads; remove it'}"


def _listed(places: list[str]) -> str:
    if len(places) > _MOST_PLACES:
        return f"a section, such as '{places[0]}'"
    return " or ".join(f"'{place}'" if place else "the top level" for place in places)
