"""Predicted against measured memory of one rank."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from functools import partial

from everest_ds.gpu_check import official, plans
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values
from everest_ds.gpu_check.settings import MEMORY, Setting
from everest_ds.training import ranks
from everest_ds.training.engine import supports
from everest_ds.training.measure import measure


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
        folder = asked.out / "snapshots"
        folder.mkdir(parents=True, exist_ok=True)
        with snapshot.open("rb") as plain, gzip.open(folder / f"{setting.slug}.pickle.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        snapshot.unlink()
    return {
        "predicted_bytes": predicted.tensors_bytes,
        "predicted_held_bytes": predicted.states_bytes,
        "predicted_outside_bytes": predicted.outside_bytes,
        **found,
        "error": predicted.tensors_bytes / found["allocated_bytes"] - 1,
    }
