"""Predictions of all cases, made beside the first parts: ``python -m everest_ds.gpu_check.plans ASKED``.

Each goes into a file of its own, which :func:`wait_for` waits for.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from everest_ds.config.errors import UserError
from everest_ds.gpu_check.cases import Asked
from everest_ds.gpu_check.settings import EDGE, MEMORY, MEMORY_8, SPEED, Setting, edge_capacity_bytes
from everest_ds.memory.official import official_plan
from everest_ds.memory.overheads import overheads_for
from everest_ds.memory.plan import Plan, plan
from everest_ds.training import files

# Micro-batches of the speed part, largest first.
BATCHES = (256, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)
_PATIENCE_S = 120.0
_OVER = "plans-over"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan says of a setting; bytes of one rank.

    ``tensors_bytes``: the peak of a step that the device's allocator should show (on a CPU, of the process's tensors);
    ``states_bytes`` of that is held between steps; ``outside_bytes`` is outside the allocator. ``by_batch``: needed at
    other micro-batches, everything counted. ``fits``: the largest micro-batch within the edge's capacity. ``error``
    says why there is no plan.
    """

    tensors_bytes: int = 0
    states_bytes: int = 0
    outside_bytes: int = 0
    by_batch: dict[int, int] = dataclasses.field(default_factory=dict)
    fits: int = 0
    error: str = ""


def predict(setting: Setting, asked: Asked) -> Prediction:
    """Plan a setting."""
    planned = _plan(setting, asked)
    on_cpu = asked.device == "cpu"
    inside = planned.overheads.libraries_bytes
    outside = sum(planned.overheads.items(planned.setting.ranks).values()) - inside
    return Prediction(
        tensors_bytes=planned.process_peak_bytes if on_cpu else planned.predicted_peak_bytes - outside,
        states_bytes=planned.states_bytes if on_cpu else planned.held_bytes("device"),
        outside_bytes=outside,
        by_batch={batch: planned.needed_bytes(batch) for batch in BATCHES},
        fits=planned.largest_micro_batch(edge_capacity_bytes(asked)),
    )


def _plan(setting: Setting, asked: Asked) -> Plan:
    recipe = setting.recipe(asked)
    if setting.official:
        return official_plan(recipe, ranks=1)
    overheads = overheads_for(asked.device, asked.card)
    return plan(recipe, setting.ds_config(), ranks=setting.ranks, device_type=asked.device, rank=0, overheads=overheads)


def wait_for(setting: Setting, asked: Asked) -> Prediction:
    """Return a setting's prediction, as soon as it is there.

    Raises:
        UserError: it doesn't come, or there can be none.
    """
    path, over = _path(setting, asked), asked.folder / _OVER
    until = time.monotonic() + _PATIENCE_S
    while not path.is_file():
        if time.monotonic() > until or (over.is_file() and not path.is_file()):
            raise UserError("no prediction has come from the planner's process")
        time.sleep(0.1)
    values = json.loads(path.read_text(encoding="utf-8"))
    by_batch = {int(batch): size for batch, size in values["by_batch"].items()}
    found = Prediction(**{**values, "by_batch": by_batch})
    if found.error:
        raise UserError(f"the planner: {found.error}")
    return found


def _path(setting: Setting, asked: Asked) -> Path:
    return asked.folder / f"plan-{setting.slug}.json"


def _write(setting: Setting, asked: Asked) -> None:
    try:
        found = predict(setting, asked)
    except Exception as error:  # a row of the page
        found = Prediction(error=f"{type(error).__name__}: {error}")
    files.write(_path(setting, asked), json.dumps(dataclasses.asdict(found)))


def main(asked_json: str) -> None:
    """Plan everything, half of the cores at work."""
    asked = Asked.from_json(asked_json)
    settings = [s for s in (*MEMORY, *MEMORY_8, *SPEED, *EDGE) if s.asked_for(asked)]
    workers = max(1, len(os.sched_getaffinity(0)) // 2)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_write, setting, asked) for setting in settings]:
                done.result()
    finally:
        files.write(asked.folder / _OVER, "")


if __name__ == "__main__":
    main(sys.argv[1])
