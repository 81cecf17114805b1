"""Predicted against measured memory of one rank."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from functools import partial

from everest_ds.gpu_check import official, plans
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values, WrongError
from everest_ds.gpu_check.settings import MEMORY, Setting, plain_name
from everest_ds.memory import meters
from everest_ds.memory.gpus import gib
from everest_ds.training import ranks
from everest_ds.training.engine import supports
from everest_ds.training.measure import measure

_BOUND = 0.1


def cases(asked: Asked) -> Iterator[Case]:
    """Every row of the table."""
    ranks.start()
    yield from of_settings(MEMORY, asked)


def of_settings(settings: tuple[Setting, ...], asked: Asked) -> Iterator[Case]:
    """The rows of a table that are asked for."""
    for setting in settings:
        if setting.asked_for(asked):
            yield Case(name=setting.name, run=partial(compare, setting, asked))


def compare(setting: Setting, asked: Asked) -> Values:
    """Measure a setting, and hold it against its plan. Bytes."""
    if not (setting.official or supports(setting.precision)):
        raise NotHereError(f"this device has no {setting.precision}")
    predicted = plans.wait_for(setting, asked)
    free = meters.available_bytes(ranks.device())
    if predicted.tensors_bytes > free:
        raise NotHereError(f"the plan needs {gib(predicted.tensors_bytes)}, and {gib(free)} is free")
    recipe, keep = setting.recipe(asked), asked.device == "cuda"
    snapshot = asked.folder / f"{setting.slug}.pickle" if keep else None
    if setting.official:
        found = official.measure(recipe, snapshot=snapshot)
    else:
        measured = measure(recipe, setting.ds_config(), steps=1, snapshot=snapshot)
        found = {
            "allocated_bytes": measured.measured_peak_bytes,
            "held_bytes": measured.states_bytes,
            "step_s": measured.step_s,
            "optimizer": measured.optimizer,
            **measured.device_memory,
        }
    if snapshot is not None:
        folder = asked.out / "snapshots" / plain_name(asked.card)
        folder.mkdir(parents=True, exist_ok=True)
        with snapshot.open("rb") as plain, gzip.open(folder / f"{setting.slug}.pickle.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        snapshot.unlink()
    error = predicted.tensors_bytes / found["allocated_bytes"] - 1
    values = {
        "predicted_bytes": predicted.tensors_bytes,
        "predicted_held_bytes": predicted.states_bytes,
        "predicted_outside_bytes": predicted.outside_bytes,
        **found,
        "error": error,
    }
    # The official setting's plan is of CUDA's autocast, which keeps other things than a CPU's.
    if abs(error) > _BOUND and not (setting.official and asked.device == "cpu"):
        raise WrongError(f"predicted and allocated are {error:+.0%} apart, more than {_BOUND:.0%}", values)
    return values
