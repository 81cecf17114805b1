"""DeepSpeed's monitors (TensorBoard, CSV files, Weights & Biases, Comet): where they write, and what they are given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import Monitor, MonitorMaster

log = logging.getLogger(__name__)

# Sections of a DeepSpeed JSON.
_IN_FILES = ("tensorboard", "csv_monitor")
SECTIONS = (*_IN_FILES, "wandb", "comet")


def placed(ds: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return a resolved DeepSpeed configuration that says where the monitors of this run write.

    A relative ``output_path`` starts from the run directory, and is the section's name where there is none. Without a
    ``job_name``, which is a folder in it, that is the run directory's name.
    """
    found = dict(ds)
    for name in _IN_FILES:
        if section := ds.get(name):
            folder = (run_dir / Path(section.get("output_path") or name).expanduser()).absolute()
            found[name] = {"job_name": run_dir.resolve().name, **section, "output_path": str(folder)}
    if section := ds.get("comet"):
        # DeepSpeed leaves out what comes sooner after the last; ours come every train.log_every_steps already.
        found["comet"] = {"samples_log_interval": 1, **section}
    return found


class Monitors:
    """Gives the monitors of an engine what a run logs, and nothing else, against optimizer steps.

    One that fails is named, once, and the run goes on.

    Args:
        master: the engine's; only rank 0's has monitors.
    """

    def __init__(self, master: MonitorMaster) -> None:
        # The engine's own events have another axis: the samples of this process, from 0 again when a run continues.
        master.enabled = False
        self._monitors = [one for one in vars(master).values() if isinstance(one, Monitor)]
        self._named: set[Monitor] = set()
        for one in self._monitors:
            if isinstance(one, csvMonitor):
                # It begins with a header wherever it hasn't written yet: in the middle, when a run continues.
                one.filenames += [path.stem for path in Path(one.log_dir).glob("*.csv")]

    def write(self, group: str, record: Mapping[str, Any]) -> None:
        """Write a record of ``step`` and numbers; ``loss`` becomes ``group/loss``, None is left out."""
        numbers = {key: value for key, value in record.items() if key != "step" and value is not None}
        events = [(f"{group}/{key}", value, record["step"]) for key, value in numbers.items()]
        for one in self._monitors:
            try:
                one.write_events(events)
            except Exception as error:  # each has exceptions of its own
                if one not in self._named:
                    self._named.add(one)
                    name, reason = type(one).__name__, str(error) or type(error).__name__
                    log.warning("%s can't write (%s); the run goes on, and its .jsonl files have all", name, reason)
