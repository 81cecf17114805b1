"""The run directory: what a run writes, and when it may be written over (never silently)."""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError
from everest_ds.config.json_text import parse_json
from everest_ds.config.load import AnyRecipe, dump, load_as
from everest_ds.config.schema import Recipe
from everest_ds.models.weights import WEIGHTS_FILE
from everest_ds.training import checkpoint_files, files

_PACKAGES = ("everest_ds", "torch", "torchvision", "deepspeed", "timm", "decord", "decord2", "av", "numpy")


@dataclass(frozen=True)
class RunDir:
    """Paths inside a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def ds_config(self) -> Path:
        """The resolved DeepSpeed configuration."""
        return self.path / "ds_config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def validations(self) -> Path:
        """One JSON object per validation."""
        return self.path / "validation.jsonl"

    @property
    def memory(self) -> Path:
        """What memory a rank was predicted to take, and took."""
        return self.path / "memory.json"

    @property
    def env(self) -> Path:
        """Versions, accelerator, optimizer."""
        return self.path / "env.json"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint, and ``latest``, which names the newest."""
        return self.path / "checkpoints"

    @property
    def bad_steps(self) -> Path:
        """One JSON object per step whose numbers went wrong, with its clips."""
        return self.path / "bad_steps.jsonl"

    @property
    def quarantine(self) -> Path:
        """One JSON object per video that hung or killed its reader, which is not opened again."""
        return self.path / "quarantine.jsonl"

    @property
    def traces(self) -> Path:
        """What DeepSpeed raised while the engine was built, with its traces, where it did."""
        return self.path / "deepspeed_errors.log"

    @property
    def weights(self) -> Path:
        """The weights at the run's end, for everything that isn't training."""
        return self.path / WEIGHTS_FILE

    def holds_run(self) -> bool:
        """Whether a run has been written here."""
        return self.config.is_file()

    def has_results(self) -> bool:
        """Whether a run here has got as far as a logged step, a checkpoint or weights."""
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return logged or self.has_checkpoint() or self.weights.is_file()

    def check_writable(self) -> None:
        """Make the folder.

        Raises:
            UserError: it can't be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(f"train.output_dir: cannot write to {self.path} ({error.strerror})") from error

    def has_checkpoint(self) -> bool:
        """Whether a run here has a checkpoint, though perhaps a damaged one."""
        return bool(checkpoint_files.newest_first(self.checkpoints))

    def set_aside(self) -> dict[str, str]:
        """Return the videos in :attr:`quarantine` and the reasons; a torn line is left out."""
        found = {}
        if self.quarantine.exists():
            for line in self.quarantine.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = parse_json(line)
                    found[str(record["video"])] = str(record["reason"])
        return found

    def read_recipe(self, kind: type[AnyRecipe]) -> AnyRecipe:
        """Return the resolved recipe of the run that is here, pre-training's or fine-tuning's.

        Raises:
            UserError: this isn't a run directory, or its configuration can't be read.
        """
        if not self.holds_run():
            raise UserError(f"{self.path}: not a run directory (no config.yaml in it)")
        try:
            return load_as(kind, self.config)
        except UserError as error:
            raise UserError(f"{self.config}: not the configuration of a run ({error})") from error

    def write_facts(self, recipe: Recipe, ds: dict[str, Any], env: dict[str, Any], *, from_step: int) -> None:
        """Write the resolved configurations and the environment, keeping earlier, different ones under other names."""
        self.path.mkdir(parents=True, exist_ok=True)
        texts = {
            self.config: dump(recipe),
            self.ds_config: json.dumps(ds, indent=2) + "\n",
            self.env: json.dumps(env, indent=2) + "\n",
        }
        for path, text in texts.items():
            self.write_kept(path, text, from_step=from_step)

    def write_kept(self, path: Path, text: str, *, from_step: int) -> None:
        """Write a file, keeping an earlier, different one under another name; raises OSError."""
        if path.exists() and path.read_text(encoding="utf-8") != text:
            # A copy: at no time is there no configuration, which a run that is continued must have.
            kept = _unused(path.with_name(f"{path.stem}.until-step-{from_step}{path.suffix}"))
            kept.write_bytes(path.read_bytes())
        files.write(path, text)


def environment(accelerator: str, device: str, optimizer: str, world_size: int) -> dict[str, Any]:
    """Return what env.json holds."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "accelerator": accelerator,
        "device": device,
        "ranks": world_size,
        "optimizer": optimizer,
    }


def _unused(path: Path) -> Path:
    """Return ``path``, numbered if something is there."""
    numbered = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
