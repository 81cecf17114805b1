"""What memory a run took, beside what was predicted: ``memory.json``, at the end of every run."""

from __future__ import annotations

import json
import logging
import sys

from everest_ds.memory import meters
from everest_ds.memory.plan import Plan
from everest_ds.memory.record import OTHER, Items, Measured, as_record, in_a_line
from everest_ds.training import ranks
from everest_ds.training.held import held_items
from everest_ds.training.loop import Training
from everest_ds.training.run_dir import RunDir

log = logging.getLogger(__name__)


class Account:
    """This rank's meters, from before the model is built."""

    def __init__(self) -> None:
        self._device = ranks.device()
        self._leftover = meters.Leftover(self._device)
        self._peak = meters.PeakSince(self._device)

    def read(self, run: Training) -> Measured:
        """Read them between steps, the loader closed."""
        peak_bytes, reserved_bytes = self._peak.read()
        meters.forget_workspaces(self._device)  # a plan counts them with a step
        held_bytes = meters.states_bytes(self._device) - self._leftover.still_bytes()
        places = {self._device.type: "device"} | ({} if self._device.type == "cpu" else {"cpu": "host"})
        found = held_items(run.engine, run.average, run.loader)
        held: dict[str, Items] = {name: found.get(kind, {}) for kind, name in places.items()}
        held["device"][OTHER] = held_bytes - sum(held["device"].values())
        return Measured(
            rank=ranks.rank(),
            held_bytes=held_bytes,
            held=held,
            peak_bytes=peak_bytes,
            reserved_bytes=reserved_bytes,
        )


def record_memory(account: Account, planned: Plan | None, run: Training, run_dir: RunDir) -> None:
    """Write ``memory.json`` and say in a line what is in it; a collective call.

    Nothing where the run has taken no step: what it would hold isn't all there.

    Args:
        account: this rank's.
        planned: on rank 0.
        run: after its last step.
        run_dir: the run's.
    """
    if run.step == run.resumed.step:
        return
    per_rank = ranks.gather(_read(account, run))
    if planned is None or None in per_rank:
        return
    record = as_record(planned, per_rank, steps=(run.resumed.step, run.step))
    try:
        run_dir.write_kept(run_dir.memory, json.dumps(record, indent=2) + "\n", from_step=run.resumed.step)
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be written (%s)", run_dir.memory, error)
        return
    print(f"{in_a_line(record)}; {run_dir.memory}", file=sys.stderr, flush=True)


def _read(account: Account, run: Training) -> Measured | None:
    try:
        return account.read(run)
    except Exception as error:
        log.warning("memory.json: not written, please report it: %s: %s", type(error).__name__, error)
        return None
