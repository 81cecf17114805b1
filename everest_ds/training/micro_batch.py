"""``train.micro_batch=auto``: the largest that the planner says fits, chosen before anything is allocated.

Every rank plans for itself and comes to the same choice: the ranks agree on the smallest room among them first.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from everest_ds.config.batches import AUTO, open_share
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import AnyRecipe, to_tree
from everest_ds.config.schema import Recipe
from everest_ds.memory import meters
from everest_ds.memory.elastic import Choice, choose, with_micro_batch
from everest_ds.memory.fit import modes_of
from everest_ds.memory.gpus import Capacity, gib, parse_capacity
from everest_ds.memory.overheads import RESERVE, overheads_for
from everest_ds.training import ranks
from everest_ds.training.engine import resolve

_MIB = 2**20
# On a CPU, what libraries take on first use, after the choice: DeepSpeed's engine, gloo, kernels. Measured by what the
# resident set of tests/e2e/test_micro_batch.py grows beyond the plan: 88 MiB.
_LIBRARIES_BYTES = 128 * _MIB
_AUTO_KEY = "train.micro_batch=auto"


class Room(NamedTuple):
    """Bytes that a rank's plan may come to, and where they are from. The smallest is the one that counts."""

    size_bytes: int
    origin: str

    def __str__(self) -> str:
        return f"{gib(self.size_bytes)} ({self.origin})"


def fill_micro_batch(recipe: AnyRecipe, raw_ds_config: dict[str, Any], model: nn.Module) -> tuple[AnyRecipe, list[str]]:
    """Put a number in the place of ``train.micro_batch=auto``. With "auto", a collective call.

    Args:
        recipe: of the run.
        raw_ds_config: the DeepSpeed JSON as loaded.
        model: built, on the CPU.

    Returns:
        The recipe with a number, and the line that says how it came about; as it was and no line without "auto".

    Raises:
        UserError: the global batch isn't known or can't be shared out, the JSON leaves nothing open, DeepSpeed refuses
            it, ``train.capacity`` is none, or not even one clip fits.
    """
    if recipe.train.micro_batch != AUTO:
        return recipe, []
    share = open_share(recipe.train, raw_ds_config, ranks.world_size(), recipe.data.clips_per_video)
    stated = recipe.train.capacity
    capacity = None if stated is None else parse_capacity(stated, key="train.capacity")
    # What DeepSpeed refuses, nobody can plan.
    resolve(raw_ds_config, with_micro_batch(recipe, share), model)
    room = smallest_room(capacity, model)
    choice = _choose(recipe, raw_ds_config, room)
    if not choice.fits:
        raise UserError(f"{_AUTO_KEY}: {_nothing_fits(choice, recipe, raw_ds_config, room)}")
    batches = choice.batches
    line = (
        f"{_AUTO_KEY}: micro-batch {batches.micro} x accumulation {batches.accumulation} x ranks {batches.ranks}; "
        f"predicted peak {gib(choice.needed_bytes)} per rank of {room}"
    )
    return with_micro_batch(recipe, batches.micro), [line]


def smallest_room(capacity: Capacity | None, model: nn.Module) -> Room:
    """Return the room of the rank that has least; a collective call, for which the ranks join their group."""
    with ranks.naming_the_lost():
        ranks.start()
        ranks.gather(None)  # not before all have built their model: ranks on one CPU see each other's
        return min(ranks.gather(_room(capacity, model)))


def _room(capacity: Capacity | None, model: nn.Module) -> Room:
    device = ranks.device()
    available = meters.available_bytes(device)
    if device.type == "cpu":
        # The plan counts the weights, which are here already, and nothing else of what the process holds.
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        held, local = meters.resident_bytes() - weights + _LIBRARIES_BYTES, ranks.local_world_size()
        free, of_stated = (
            available // local + weights - _LIBRARIES_BYTES,
            f" less {gib(held)} for process and libraries",
        )
        origin = "free memory" if local == 1 else f"one part in {local} of the free memory"
    else:
        # The plan counts the context, which took its part of the device when that was asked.
        held, of_stated = 0, ""
        free, origin = available + overheads_for(device.type).context_bytes, "free on the device"
    if capacity is None:
        return Room(int(free * (1 - RESERVE)), f"{origin}, less {RESERVE:.0%}")
    stated = Room(max(0, capacity.size_bytes - held), f"train.capacity {capacity.text}{of_stated}")
    return min(stated, Room(free, origin))


def _choose(recipe: Recipe, raw_ds_config: dict[str, Any], room: Room) -> Choice:
    return choose(
        recipe,
        raw_ds_config,
        ranks=ranks.world_size(),
        capacity_bytes=room.size_bytes,
        device_type=ranks.device().type,
    )


def _nothing_fits(choice: Choice, recipe: Recipe, raw_ds_config: dict[str, Any], room: Room) -> str:
    micro = choice.batches.micro
    what = "one clip does not" if micro == 1 else f"data.clips_per_video = {micro} clips do not"
    mode = modes_of(recipe)[-1]
    model = dataclasses.replace(recipe.model, checkpointing=mode)  # type: ignore[arg-type]
    lighter = _choose(dataclasses.replace(recipe, model=model), raw_ds_config, room)
    would = f"model.checkpointing={mode} needs {gib(lighter.needed_bytes)}"
    advice = f"{would} and fits" if lighter.fits else f"{would}: use a ds_config with more of ZeRO, or offload"
    return (
        f"even {what} fit: {gib(choice.needed_bytes)} per rank, of {room}; {advice}; all that would: "
        f"{fit_command(recipe, room.size_bytes)}"
    )


def fit_command(recipe: Recipe, capacity_bytes: int | None = None) -> str:
    """Return the command that lists what fits, for this model and these ranks; a capacity of None is left open."""
    model = recipe.model
    own = (
        ["--phase", "finetune", "--classes", str(model.classes)]
        if isinstance(model, ClassifierConfig)
        else ["--method", model.method]
    )
    plain = type(model)(size=model.size, method=model.method)
    changed = dict(_changed(to_tree(model), to_tree(plain), "model."))
    keys = [f"{key}={value}" for key, value in changed.items() if key not in ("model.checkpointing", "model.classes")]
    capacity = "SIZE" if capacity_bytes is None else f"{max(1, capacity_bytes // _MIB)}MiB"
    where = ["--world-size", str(ranks.world_size()), "--capacity", capacity, "--device", ranks.device().type]
    return shlex.join(["python", "tools/memprof", "fit", *own, "--model", model.size, *where, *keys])


def _changed(tree: Mapping[str, Any], plain: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _changed(value, plain[key], f"{prefix}{key}.")
        elif value != plain[key]:
            yield prefix + key, value
