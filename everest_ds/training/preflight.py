"""Before the model is built: what a rank of the run will need, beside what there is."""

from __future__ import annotations

import logging
import sys
from typing import Any

from everest_ds.config.batches import Batches
from everest_ds.config.errors import UserError
from everest_ds.config.schema import Recipe
from everest_ds.memory.gpus import size
from everest_ds.memory.plan import Plan, plan
from everest_ds.training import ranks
from everest_ds.training.micro_batch import advice
from everest_ds.training.room import Room, host_room_bytes

log = logging.getLogger(__name__)

FLAG = "--no-preflight"


def check_memory(
    asked: Recipe, recipe: Recipe, raw_ds_config: dict[str, Any], ds_config: dict[str, Any], room: Room | None
) -> Plan | None:
    """Let rank 0 plan the run and say what it will need. Returns the plan there, None elsewhere; a collective call.

    Args:
        asked: the recipe as it came, whose micro-batch may be "auto": advice is about that one.
        recipe: with numbers.
        raw_ds_config: the DeepSpeed JSON as loaded.
        ds_config: the resolved one.
        room: of the rank that has least; None: nothing is judged.

    Raises:
        UserError: it takes more than there is.
    """
    kept: list[Plan] = []

    def judge() -> None:
        try:
            planned = plan(recipe, ds_config, ranks=ranks.world_size(), device_type=ranks.device().type)
            needed_bytes = planned.needed_bytes(planned.batches.micro)
        except UserError:
            raise
        except Exception as error:
            log.warning("memory: not predicted, please report it: %s: %s", type(error).__name__, error)
            return
        unlike = _unlike(recipe, ds_config)
        if room is not None and needed_bytes > room.size_bytes and not unlike:
            raise UserError(_too_much(asked, raw_ds_config, planned.batches, needed_bytes, room))
        print(_line(planned, needed_bytes, room) + unlike, file=sys.stderr, flush=True)
        _warn_of_host(planned)
        if room is not None and needed_bytes > room.planned_bytes:
            log.warning(
                "memory: tight: %s of %s; less would be safer, for allocators can't use every hole between blocks",
                *(size(needed_bytes), size(room.size_bytes)),
            )
        kept.append(planned)

    ranks.from_rank_0(judge)
    return kept[0] if kept else None


def _unlike(recipe: Recipe, ds_config: dict[str, Any]) -> str:
    """Say what the plan leaves out, so that nothing is refused by it; "" where it is the run's own."""
    autocast = (ds_config.get("torch_autocast") or {}).get("enabled", False)
    names = [*(["torch_autocast"] if autocast else []), *(["train.compile"] if recipe.train.compile else [])]
    return f"; planned without {' and '.join(names)}, which takes less or more" if names else ""


def _warn_of_host(planned: Plan) -> None:
    wanted, there = sum(planned.host.values()), host_room_bytes()
    if there is not None and wanted > there:
        log.warning(
            "memory: a rank offloads %s to the host, and its part of what is free there is %s",
            size(wanted),
            size(there),
        )


def _line(planned: Plan, needed_bytes: int, room: Room | None) -> str:
    local = ranks.local_world_size()
    on_cpu = planned.device_type == "cpu"
    together = f", {size(local * needed_bytes)} for the {local} ranks of this machine" if on_cpu and local > 1 else ""
    offloaded = sum(planned.host.values())
    host = f" and {size(offloaded)} of the host's memory" if offloaded and not on_cpu else ""
    there = f"not held against what is free ({FLAG})" if room is None else f"there is {_all_of(room)}"
    at = f"at micro-batch {planned.batches.micro}"
    return f"memory: predicted peak {size(needed_bytes)} per rank {at}{host}{together}; {there}"


def _all_of(room: Room) -> str:
    return f"{size(room.size_bytes)} per rank ({room.origin})"


def _too_much(asked: Recipe, raw_ds_config: dict[str, Any], batches: Batches, needed_bytes: int, room: Room) -> str:
    return (
        f"memory: a rank needs {size(needed_bytes)}, and there is {_all_of(room)}; "
        f"{advice(asked, raw_ds_config, batches, room)}; {FLAG} trains all the same"
    )
