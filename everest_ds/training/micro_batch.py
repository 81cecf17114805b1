"""``train.micro_batch=auto``: the largest that the planner says fits, chosen before anything is allocated."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from everest_ds.config.batches import AUTO, Batches, open_share
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import to_tree
from everest_ds.config.schema import Recipe
from everest_ds.memory.advice import Stuck
from everest_ds.memory.elastic import Choice, choose, with_micro_batch
from everest_ds.memory.gpus import gib, size
from everest_ds.training import ranks
from everest_ds.training.engine import resolve
from everest_ds.training.room import Room, capacity_of, host_room_bytes, smallest_room

_MIB = 2**20
_AUTO_KEY = "train.micro_batch=auto"


class Filled(NamedTuple):
    """A recipe whose micro-batch is a number; if it was "auto", the line that says how, and the room it is for."""

    recipe: Recipe
    lines: list[str]
    room: Room | None


def fill_micro_batch(recipe: Recipe, raw_ds_config: dict[str, Any]) -> Filled:
    """Put a number in the place of ``train.micro_batch=auto``, which rank 0 plans. With "auto", a collective call.

    Args:
        recipe: of the run.
        raw_ds_config: the DeepSpeed JSON as loaded.

    Raises:
        UserError: the global batch isn't known or can't be shared out, the JSON leaves nothing open, DeepSpeed refuses
            it, ``train.capacity`` is none, or not even one clip fits.
    """
    if recipe.train.micro_batch != AUTO:
        return Filled(recipe, [], None)
    share = open_share(recipe.train, raw_ds_config, ranks.world_size(), recipe.data.clips_per_video)
    capacity = capacity_of(recipe.train.capacity)
    # What DeepSpeed refuses, nobody can plan.
    resolve(raw_ds_config, with_micro_batch(recipe, share))
    room = smallest_room(capacity)
    batches, line = ranks.from_rank_0(lambda: _chosen(recipe, raw_ds_config, room))
    return Filled(with_micro_batch(recipe, batches.micro), [line], room)


def _chosen(recipe: Recipe, raw_ds_config: dict[str, Any], room: Room) -> tuple[Batches, str]:
    choice = choose(
        recipe,
        raw_ds_config,
        ranks=ranks.world_size(),
        capacity_bytes=room.planned_bytes,
        device_type=ranks.device().type,
    )
    if not choice.fits:
        raise UserError(f"{_AUTO_KEY}: {_nothing_fits(choice, recipe, raw_ds_config, room)}")
    batches = choice.batches
    return batches, (
        f"{_AUTO_KEY}: micro-batch {batches.micro} x accumulation {batches.accumulation} x ranks {batches.ranks}; "
        f"predicted peak {gib(choice.needed_bytes)} per rank of {room}"
    )


def _nothing_fits(choice: Choice, recipe: Recipe, raw_ds_config: dict[str, Any], room: Room) -> str:
    micro = choice.batches.micro
    what = "one clip does not" if micro == 1 else f"data.clips_per_video = {micro} clips do not"
    return (
        f"even {what} fit: {gib(choice.needed_bytes)} per rank, of {room}; "
        f"{advice(recipe, raw_ds_config, choice.batches, room)}"
    )


def advice(recipe: Recipe, raw_ds_config: Mapping[str, Any], batches: Batches, room: Room) -> str:
    """Return what to add to the command of a run that doesn't fit: words that were planned, in seconds."""
    stuck = Stuck(
        recipe=recipe,
        ds_config=raw_ds_config,
        batches=batches,
        capacity_bytes=room.planned_bytes,
        device_type=ranks.device().type,
        host_bytes=host_room_bytes(),
    )
    # Seconds for small models, a minute for ViT-g.
    print("memory: more than there is; planning what would fit", file=sys.stderr, flush=True)
    way = stuck.best_way()
    if way is not None and way.fits:
        instead = " (in place of your JSON: copy what else that says)" if "--ds_config" in way.words else ""
        return f"what fits, with {size(way.needed_bytes)}: the same command with {way.words}{instead}"
    least = "" if way is None else f" ({way.words} needs least, {size(way.needed_bytes)})"
    return (
        f"nothing that was tried fits{least}: take a smaller model, more ranks or more memory; what a rank can hold: "
        f"{fit_command(recipe, room.planned_bytes)}"
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
